// Engines and the hold queue, as tables.

import type { EngineRow, HeldGroup, LiveSnapshot } from "./contract";
import { count, place, seconds } from "./words";

const WORDS: Record<string, string> = {
  notReady: "not ready",
  ejected: "paused after failures",
  stalled: "makes no steps",
  failed: "failed, is started again",
  stopped: "stopped after a drain",
};

export function Fleet({ rows }: { rows: readonly EngineRow[] }) {
  const ready = rows.filter((row) => row.status === "ready").length;
  const hasRoles = rows.some((row) => row.role);
  return (
    <section aria-labelledby="fleet">
      <h2 id="fleet">Engines</h2>
      <p class="soft">
        {ready} of {rows.length} {rows.length === 1 ? "rank takes" : "ranks take"} requests.
      </p>
      <div class="scroll" tabIndex={0} role="region" aria-label="Engines">
        <table>
          <thead>
            <tr>
              <th scope="col">engine</th>
              {hasRoles && <th scope="col">role</th>}
              <th scope="col">status</th>
              <th scope="col" class="number">running</th>
              <th scope="col" class="number">waiting</th>
              <th scope="col" class="number">prompt tokens waiting</th>
              <th scope="col">KV in use</th>
              <th scope="col" class="number">tokens/s</th>
              <th scope="col" class="number">between steps</th>
              <th scope="col" class="number">signal</th>
            </tr>
          </thead>
          <tbody>
            {rows.map((row) => (
              <tr key={`${row.name}/${row.rank}`}>
                <th scope="row">{place(row.name, row.rank)}</th>
                {hasRoles && <td>{row.role}</td>}
                <td>
                  <span class={`status ${row.status}`}>{WORDS[row.status] ?? row.status}</span>
                  {row.words && <div class="words soft">{row.words}</div>}
                </td>
                <td class="number">{row.running}</td>
                <td class="number">{row.waiting}</td>
                <td class="number">{count(row.waiting_prefill_tokens)}</td>
                <td>{row.kv_usage === null ? "–" : <Meter value={row.kv_usage} label={`KV of ${row.name}`} />}</td>
                <td class="number">{count(row.tokens_per_s)}</td>
                <td class="number">{seconds(row.step_s)}</td>
                <td class={`number ${row.signal_source === "in_flight" ? "late" : ""}`}>
                  {row.signal_source === "in_flight" ? "none" : `${seconds(row.signal_age_s)} old`}
                </td>
              </tr>
            ))}
          </tbody>
        </table>
      </div>
    </section>
  );
}

function Meter({ value, label }: { value: number; label: string }) {
  return (
    <>
      <meter min={0} max={1} high={0.9} optimum={0} value={value} aria-label={label} /> {Math.round(value * 100)} %
    </>
  );
}

export function Held({ snapshot }: { snapshot: LiveSnapshot }) {
  const { held, point, hold_limit, hold_timeout_s } = snapshot;
  return (
    <section aria-labelledby="held">
      <h2 id="held">Held in the gateway</h2>
      {point.held === 0 ? (
        <p class="soft">{snapshot.accepting ? "None: each request goes to an engine at once." : "None."}</p>
      ) : (
        <>
          <p>
            {point.held} of at most {hold_limit} requests wait for an engine; after {seconds(hold_timeout_s)} one is refused.
          </p>
          <table>
            <thead>
              <tr>
                <th scope="col" class="number">class</th>
                <th scope="col">tenant</th>
                <th scope="col" class="number">requests</th>
                <th scope="col" class="number">prompt tokens</th>
                <th scope="col" class="number">longest wait</th>
              </tr>
            </thead>
            <tbody>{held.map(Group)}</tbody>
          </table>
        </>
      )}
    </section>
  );
}

function Group(row: HeldGroup) {
  return (
    <tr key={`${row.priority}/${row.tenant}`}>
      <td class="number">{row.priority}</td>
      <td>{row.tenant || "anonymous"}</td>
      <td class="number">{row.requests}</td>
      <td class="number">{count(row.prompt_tokens)}</td>
      <td class="number">{seconds(row.oldest_s)}</td>
    </tr>
  );
}
