// Reads the server-sent events of the gateway. `EventSource` cannot send the page key as a header.

import type { Events } from "./contract";

export type State = "connecting" | "live" | "lost" | "key";
export type Handlers = { [Name in keyof Events]: (document: Events[Name]) => void };

const FIRST_RETRY_MS = 1000;
const LONGEST_RETRY_MS = 10_000;
const NAME = "moeserving-page-key";

/** The page key: from the address, where the command line puts it, then kept for this tab alone. */
export function takeKey(): string {
  const given = new URLSearchParams(location.hash.slice(1)).get("key");
  if (given !== null) {
    sessionStorage.setItem(NAME, given);
    history.replaceState(null, "", location.pathname);
  }
  return sessionStorage.getItem(NAME) ?? "";
}

export function keepKey(key: string): void {
  sessionStorage.setItem(NAME, key.trim());
}

/** Follows the events until the returned function is called; after a loss it connects again. */
export function follow(key: string, engine: string, handlers: Handlers, onState: (state: State) => void): () => void {
  const stop = new AbortController();
  void run(key, engine, handlers, onState, stop.signal);
  return () => stop.abort();
}

async function run(key: string, engine: string, handlers: Handlers, onState: (state: State) => void, signal: AbortSignal) {
  let retryMs = FIRST_RETRY_MS;
  while (!signal.aborted) {
    try {
      const answer = await fetch(`events?experts=${encodeURIComponent(engine)}`, {
        headers: { Authorization: `Bearer ${key}` },
        cache: "no-store",
        signal,
      });
      if (answer.status === 401) return onState("key");
      if (answer.ok && answer.body) {
        onState("live");
        retryMs = FIRST_RETRY_MS;
        await read(answer.body, handlers);
      }
    } catch {
      // The gateway is gone, or this was stopped.
    }
    if (signal.aborted) return;
    onState("lost");
    await new Promise((resolve) => setTimeout(resolve, retryMs));
    retryMs = Math.min(LONGEST_RETRY_MS, 2 * retryMs);
  }
}

async function read(body: ReadableStream<Uint8Array>, handlers: Handlers) {
  const reader = body.pipeThrough(new TextDecoderStream() as ReadableWritablePair<string, Uint8Array>).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const events = (text + value).split("\n\n");
    text = events.pop() ?? "";
    for (const event of events) dispatch(event, handlers);
  }
}

function dispatch(event: string, handlers: Handlers) {
  const [head = "", data = ""] = event.split("\n", 2);
  const name = head.slice("event: ".length);
  if (name in handlers) {
    (handlers as unknown as Record<string, (document: unknown) => void>)[name]!(JSON.parse(data.slice("data: ".length)));
  }
}
