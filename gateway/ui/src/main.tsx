// The live page: one view of the newest documents of the gateway.

import { render } from "preact";
import { useEffect, useState } from "preact/hooks";
import type { ExpertsSnapshot, PageFinding, LiveSnapshot, TimePoint } from "./contract";
import { Chart } from "./charts";
import { Experts } from "./experts";
import { Fleet, Held } from "./fleet";
import { Requests } from "./requests";
import { follow, keepKey, type State, takeKey, watchKey } from "./stream";
import { clock, count, policies, seconds, withGaps } from "./words";
import "./style.css";

const KEPT_POINTS = 600;

function useDark(): boolean {
  const query = matchMedia("(prefers-color-scheme: dark)");
  const [dark, setDark] = useState(query.matches);
  useEffect(() => {
    const changed = () => setDark(query.matches);
    query.addEventListener("change", changed);
    return () => query.removeEventListener("change", changed);
  }, []);
  return dark;
}

/** Names of the engines whose agents may know experts, the one with the least balanced experts first. */
function expertEngines(snapshot: LiveSnapshot): string[] {
  const rows = snapshot.engines.filter((row) => row.signal_source !== "scrape");
  return [...new Set([...rows].sort((a, b) => b.expert_balance - a.expert_balance).map((row) => row.name))];
}

function Page() {
  const [key, setKey] = useState(takeKey);
  const [state, setState] = useState<State>("connecting");
  const [snapshot, setSnapshot] = useState<LiveSnapshot | null>(null);
  const [points, setPoints] = useState<readonly TimePoint[]>([]);
  const [engine, setEngine] = useState("");
  const [experts, setExperts] = useState<ExpertsSnapshot | null>(null);
  const dark = useDark();

  const choose = (name: string) => {
    setExperts(null);
    setEngine(name);
  };
  useEffect(() => watchKey(setKey), []);
  useEffect(() => {
    const handlers = {
      // Those of a page that was cut off for a moment are kept where the gateway knows less.
      history: ({ points: before }: { points: readonly TimePoint[] }) => setPoints((now) => (before.length > now.length ? before : now)),
      snapshot: (document: LiveSnapshot) => {
        setSnapshot(document);
        setPoints((now) => (now[now.length - 1]?.at_s === document.point.at_s ? now : [...now, document.point].slice(-KEPT_POINTS)));
        // The chosen one may have gone: after a rollout others are there.
        const offered = expertEngines(document);
        if (!offered.includes(engine)) choose(offered[0] ?? "");
      },
      experts: (document: ExpertsSnapshot) => {
        if (document.engine === engine) setExperts(document);
      },
    };
    return follow(key, engine, handlers, setState);
  }, [key, engine]);

  return (
    <>
      <Head state={state} snapshot={snapshot} />
      <main>
        {state === "key" && <AskKey onKey={setKey} />}
        {snapshot && state !== "key" && (
          <>
            <Health snapshot={snapshot} state={state} />
            <Numbers snapshot={snapshot} points={points} />
            <OtherGateways snapshot={snapshot} />
            <Requests snapshot={snapshot} />
            <Speed snapshot={snapshot} points={points} dark={dark} />
            <Experts engines={expertEngines(snapshot).sort()} engine={engine} experts={experts} onChoose={choose} />
            <Fleet rows={snapshot.engines} />
            <Held snapshot={snapshot} />
            <Changes snapshot={snapshot} />
          </>
        )}
      </main>
    </>
  );
}

const STATES: Record<State, string> = {
  connecting: "connecting …",
  live: "live",
  lost: "nothing arrives from the gateway, trying again …",
  full: "too many pages are open at this gateway, trying again …",
  off: "the live page is switched off at this gateway, trying again …",
  key: "locked",
};
const WHY_OLD: Partial<Record<State, string>> = {
  lost: "Nothing arrives from the gateway.",
  full: "Too many pages are open at this gateway; close one.",
  off: "The live page is switched off at this gateway.",
};

function Head({ state, snapshot }: { state: State; snapshot: LiveSnapshot | null }) {
  return (
    <header>
      <h1>MoEServing</h1>
      <span>
        {snapshot?.models.join(", ")}
        {snapshot?.pod ? ` · gateway ${snapshot.pod}` : ""}
        {snapshot && snapshot.gateways.length > 1 ? `, one of ${snapshot.gateways.length}` : ""}
      </span>
      <span class={`state ${state}`} role="status">
        {STATES[state]}
        {state === "live" && snapshot ? ` ${clock(snapshot.at_s)}` : ""}
      </span>
    </header>
  );
}

function AskKey({ onKey }: { onKey: (key: string) => void }) {
  const [text, setText] = useState("");
  const submit = (event: Event) => {
    event.preventDefault();
    keepKey(text);
    onKey(text.trim());
  };
  return (
    <section aria-labelledby="locked">
      <h2 id="locked">The page key is needed</h2>
      <p>
        <code>moeserving ui NAME</code> opens this page with its key, on one machine and in a cluster.
      </p>
      <form onSubmit={submit}>
        <label>
          Page key <input type="password" autocomplete="off" value={text} onInput={(event) => setText(event.currentTarget.value)} />
        </label>{" "}
        <button type="submit">Open</button>
      </form>
    </section>
  );
}

/** Text with the parts between backticks as code. */
const withCode = (text: string) => text.split("`").map((part, number) => (number % 2 ? <code key={number}>{part}</code> : part));

const SIGNS: Record<PageFinding["severity"], string> = { error: "Error", warning: "Warning", info: "Note" };

function Health({ snapshot, state }: { snapshot: LiveSnapshot; state: State }) {
  const { findings } = snapshot;
  const whyOld = WHY_OLD[state];
  const worst = whyOld ? "error" : (findings[0]?.severity ?? "well");
  return (
    <section aria-labelledby="health" class={`health ${worst}`}>
      <h2 id="health">Is anything wrong?</h2>
      <div role="status">
        {whyOld && (
          <p>
            {whyOld} All below is of {clock(snapshot.at_s)}.
          </p>
        )}
        {findings.length === 0 ? (
          !whyOld && (
            <p>
              No: all engines take requests.
              {snapshot.ttft_target_s === null && snapshot.step_target_s === null && withCode(" Times are compared with those of the last minutes alone: `scheduling.engine.targets` sets no bound.")}
            </p>
          )
        ) : (
          <ul>
            {findings.map((finding) => (
              <li key={finding.kind}>
                <b class={`sign ${finding.severity}`}>{SIGNS[finding.severity]}</b> {finding.message} <span class="soft">{withCode(finding.advice)}</span>
              </li>
            ))}
          </ul>
        )}
      </div>
    </section>
  );
}

function Numbers({ snapshot, points }: { snapshot: LiveSnapshot; points: readonly TimePoint[] }) {
  const { point } = snapshot;
  const ttft = [...points].reverse().find((each) => each.ttft_s !== null)?.ttft_s ?? null;
  const step = [...points].reverse().find((each) => each.step_s !== null)?.step_s ?? null;
  const rows: readonly (readonly [string, string, string])[] = [
    ["requests/s", count(point.requests_per_s), "arrived in the last second"],
    ["first token", seconds(ttft), "mean of the last second with one"],
    ["between tokens", seconds(step), "mean time between steps of busy ranks"],
    ["tokens/s", count(point.tokens_per_s), "computed by all engines"],
    ["at engines", count(point.in_flight), "requests of this gateway"],
    ["held", count(point.held), "requests that wait in the gateway"],
    ["failed", `${snapshot.failed}`, `of ${count(snapshot.requests)} since the gateway's start${snapshot.refused ? `; ${count(snapshot.refused)} refused` : ""}`],
  ];
  return (
    <dl class="numbers">
      {rows.map(([name, value, meaning]) => (
        <div key={name}>
          <dt>{name}</dt>
          <dd>{value}</dd>
          <dd class="soft">{meaning}</dd>
        </div>
      ))}
    </dl>
  );
}

const MOST_NAMES = 8;

function OtherGateways({ snapshot }: { snapshot: LiveSnapshot }) {
  const others = snapshot.gateways.filter((name) => name !== snapshot.pod);
  if (snapshot.gateways.length < 2) return null;
  const more = others.length > MOST_NAMES ? ` and ${others.length - MOST_NAMES} more` : "";
  return (
    <p class="others soft">
      Requests, rates, times and the hold queue are those of this gateway alone; what engines run and use is for all gateways. The others:{" "}
      {others.slice(0, MOST_NAMES).join(", ")}
      {more}. <code>moeserving ui</code> prints the address of each, <code>moeserving top</code> shows them together.
    </p>
  );
}

function Speed({ snapshot, points, dark }: { snapshot: LiveSnapshot; points: readonly TimePoint[]; dark: boolean }) {
  const { times, points: shown } = withGaps(points);
  const bound = (value: number | null) => (value === null ? [] : [{ label: "bound", color: "--bound", values: times.map(() => value), dashed: true }]);
  return (
    <section aria-labelledby="speed">
      <h2 id="speed">How fast are users served?</h2>
      <div class="charts">
        <Chart
          title="Time to first token"
          dark={dark}
          times={times}
          lines={[
            { label: "mean", color: "--mean", values: shown.map((point) => point?.ttft_s ?? null) },
            { label: "p95", color: "--high", values: shown.map((point) => point?.ttft_p95_s ?? null) },
            ...bound(snapshot.ttft_target_s),
          ]}
        />
        <Chart
          title="Time between tokens"
          dark={dark}
          times={times}
          lines={[{ label: "mean", color: "--mean", values: shown.map((point) => point?.step_s ?? null) }, ...bound(snapshot.step_target_s)]}
        />
        <Chart
          title="Requests"
          dark={dark}
          times={times}
          format={count}
          lines={[
            { label: "at engines", color: "--mean", values: shown.map((point) => point?.in_flight ?? null) },
            { label: "held", color: "--high", values: shown.map((point) => point?.held ?? null) },
          ]}
        />
      </div>
      <p class="soft">
        {policies(snapshot.policy, snapshot.order)} Bounds are those of scheduling.engine.targets
        {snapshot.ttft_target_s === null && snapshot.step_target_s === null ? "; none is set" : ""}.
      </p>
    </section>
  );
}

function Changes({ snapshot }: { snapshot: LiveSnapshot }) {
  return (
    <section aria-labelledby="changes">
      <h2 id="changes">What changed</h2>
      {snapshot.events.length === 0 ? (
        <p class="soft">Nothing since a page was opened first.</p>
      ) : (
        <ol class="events">
          {snapshot.events.map((event, number) => (
            <li key={number}>
              <time dateTime={new Date(event.at_s * 1e3).toISOString()}>{clock(event.at_s)}</time>{" "}
              {event.severity !== "info" && <b class={`sign ${event.severity}`}>{SIGNS[event.severity]}</b>} {event.message}
            </li>
          ))}
        </ol>
      )}
    </section>
  );
}

render(<Page />, document.getElementById("page")!);
