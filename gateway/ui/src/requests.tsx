// The newest requests: where each went, why, and where its time went.

import { useState } from "preact/hooks";
import type { LiveSnapshot, RequestRow } from "./contract";
import { clock, count, explain, partsOf, pick, place, predictedS, seconds, waited } from "./words";

export function Bar({ row, nowS }: { row: RequestRow; nowS: number }) {
  const parts = partsOf(row, nowS);
  const total = parts.reduce((sum, part) => sum + part.seconds, 0);
  if (!total) return null;
  return (
    <div class="bar-block">
      <div class="bar" aria-hidden="true">
        {parts.map((part) => (
          <span class={`part ${part.kind}`} key={part.kind} style={{ flexGrow: part.seconds / total }} />
        ))}
      </div>
      <ul class="legend">
        {parts.map((part) => (
          <li key={part.kind}>
            <span class={`swatch ${part.kind}`} aria-hidden="true" /> <b>{seconds(part.seconds)}</b> {part.label}
          </li>
        ))}
      </ul>
    </div>
  );
}

export function Requests({ snapshot }: { snapshot: LiveSnapshot }) {
  const { newest: rows, at_s: nowS } = snapshot;
  const [chosen, setChosen] = useState<string | null>(null);
  const shown = rows.find((row) => row.record.request_id === chosen) ?? pick(rows, nowS);
  if (!shown) {
    return (
      <section aria-labelledby="why">
        <h2 id="why">Why did the last request wait?</h2>
        <p class="soft">No request yet. As soon as one came, its way stands here.</p>
      </section>
    );
  }
  const { record } = shown;
  const title = chosen !== null ? "Why did this request wait?" : record.status === null ? "Why does a request wait now?" : "Why did the last request wait?";
  return (
    <section aria-labelledby="why">
      <h2 id="why">{title}</h2>
      <div id="explanation" aria-live={chosen === null ? "off" : "polite"}>
        <p class="soft">
          <code>{record.request_id}</code> · {record.route}
          {record.model ? ` · model ${record.model}` : ""} · about {count(record.prompt_tokens)} prompt tokens · came{" "}
          {clock(shown.arrived_at_s)}
          {chosen !== null && (
            <>
              {" · "}
              <button type="button" onClick={() => setChosen(null)}>
                follow the last request
              </button>
            </>
          )}
        </p>
        <p>{explain(shown, snapshot).join(" ")}</p>
        <Bar row={shown} nowS={nowS} />
      </div>
      <div class="scroll" tabIndex={0} role="region" aria-label="The newest requests">
        <table>
          <caption class="soft">The newest requests; choose one to see why it took as long.</caption>
          <thead>
            <tr>
              <th scope="col">came</th>
              <th scope="col">request</th>
              <th scope="col">engine</th>
              <th scope="col" class="number">held</th>
              <th scope="col" class="number">first token predicted</th>
              <th scope="col" class="number">measured</th>
              <th scope="col" class="number">whole</th>
              <th scope="col">status</th>
            </tr>
          </thead>
          <tbody>
            {rows.map((row) => (
              <Row key={row.record.request_id} row={row} nowS={nowS} isShown={row === shown} onChoose={setChosen} />
            ))}
          </tbody>
        </table>
      </div>
    </section>
  );
}

function Row(props: { row: RequestRow; nowS: number; isShown: boolean; onChoose: (id: string) => void }) {
  const { row, nowS, isShown, onChoose } = props;
  const { record } = row;
  const last = record.attempts[record.attempts.length - 1];
  const predicted = predictedS(row);
  const late = record.ttft_s !== null && predicted !== null && record.ttft_s > 2 * predicted + 0.05;
  return (
    <tr class={isShown ? "shown" : ""}>
      <td>{clock(row.arrived_at_s)}</td>
      <td>
        <button type="button" class="link" aria-pressed={isShown} onClick={() => onChoose(record.request_id)}>
          {record.request_id}
        </button>
      </td>
      <td>{last ? place(last.name, last.rank) : "none"}</td>
      <td class="number">{row.held_s !== null ? `${seconds(row.held_s)} so far` : last ? seconds(last.after_s) : "–"}</td>
      <td class="number">{seconds(predicted)}</td>
      <td class={`number ${late ? "late" : ""}`}>{seconds(record.ttft_s)}</td>
      <td class="number">{record.status === null ? `${seconds(waited(row, nowS))} so far` : seconds(record.duration_s)}</td>
      <td class={(record.status ?? 0) >= 500 ? "late" : ""}>
        {record.status ?? (row.held_s !== null ? "held" : record.ttft_s !== null ? "answers" : "waits")} {record.problem}
      </td>
    </tr>
  );
}
