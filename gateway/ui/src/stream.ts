// Reads the server-sent events of the gateway. `EventSource` cannot send the page key as a header.

import type { Events } from "./contract";

/** `full`: as many pages are open as may be. `off`: the page is switched off at this gateway. */
export type State = "connecting" | "live" | "lost" | "full" | "off" | "key";
export type Handlers = { [Name in keyof Events]: (document: Events[Name]) => void };

const FIRST_RETRY_MS = 1000;
const LONGEST_RETRY_MS = 10_000;
// Snapshots come each second.
const LONGEST_SILENCE_MS = 8000;
const NAME = "moeserving-page-key";

const givenKey = () => new URLSearchParams(location.hash.slice(1)).get("key");

/** Calls the function with each key that is put into the address of the open page, until the returned one is called. */
export function watchKey(onKey: (key: string) => void): () => void {
  const changed = () => {
    if (givenKey() !== null) onKey(takeKey());
  };
  addEventListener("hashchange", changed);
  return () => removeEventListener("hashchange", changed);
}

/** The page key: from the address, where the command line puts it, then kept for this tab alone. */
export function takeKey(): string {
  const given = givenKey();
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
    let state: State = "lost";
    const listening = new Listening(signal);
    try {
      const answer = await fetch(`events?experts=${encodeURIComponent(engine)}`, {
        headers: { Authorization: `Bearer ${key}` },
        cache: "no-store",
        signal: listening.signal,
      });
      if (answer.status === 401) return onState("key");
      if (answer.status === 503) state = "full";
      if (answer.status === 404) state = "off";
      if (answer.ok && answer.body) {
        await read(answer.body, (event) => {
          if (listening.signal.aborted || !dispatch(event, handlers)) return;
          listening.heard();
          retryMs = FIRST_RETRY_MS;
          onState("live");
        });
      }
    } catch {
      // The gateway is gone or silent, or this was stopped.
    } finally {
      listening.end();
    }
    if (signal.aborted) return;
    onState(state);
    await new Promise((resolve) => setTimeout(resolve, retryMs));
    retryMs = Math.min(LONGEST_RETRY_MS, 2 * retryMs);
  }
}

/** One try to follow the events: it is aborted when nothing is heard for a while, or when the page stops. */
class Listening {
  private readonly stop = new AbortController();
  readonly signal = this.stop.signal;
  private readonly abort = () => this.stop.abort();
  private timer = setTimeout(this.abort, LONGEST_SILENCE_MS);

  constructor(private readonly outer: AbortSignal) {
    outer.addEventListener("abort", this.abort);
  }

  heard() {
    clearTimeout(this.timer);
    this.timer = setTimeout(this.abort, LONGEST_SILENCE_MS);
  }

  end() {
    clearTimeout(this.timer);
    this.outer.removeEventListener("abort", this.abort);
    this.stop.abort();
  }
}

async function read(body: ReadableStream<Uint8Array>, onEvent: (event: string) => void) {
  const reader = body.pipeThrough(new TextDecoderStream() as ReadableWritablePair<string, Uint8Array>).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const events = (text + value).split("\n\n");
    text = events.pop() ?? "";
    for (const event of events) onEvent(event);
  }
}

/** Gives an event to its handler; whether there is one. */
function dispatch(event: string, handlers: Handlers): boolean {
  const [head = "", data = ""] = event.split("\n", 2);
  const name = head.slice("event: ".length);
  if (!(name in handlers)) return false;
  (handlers as unknown as Record<string, (document: unknown) => void>)[name]!(JSON.parse(data.slice("data: ".length)));
  return true;
}
