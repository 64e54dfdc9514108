// The experts of one engine: heat by layer and rank or expert, and each move with its gain.

import { useMemo, useState } from "preact/hooks";
import type { ExpertMove, ExpertsSnapshot } from "./contract";
import { HeatMap } from "./heat";
import { clock, hottest, seconds, unpack } from "./words";

interface Props {
  readonly engines: readonly string[];
  readonly engine: string;
  readonly experts: ExpertsSnapshot | null;
  readonly onChoose: (engine: string) => void;
}

const SHOWN = 5;

export function Experts({ engines, engine, experts, onChoose }: Props) {
  const [view, setView] = useState<"rank" | "expert">("rank");
  const isRank = view === "rank";
  const text = experts ? (isRank ? experts.by_rank : experts.by_expert) : "";
  const bytes = useMemo(() => unpack(text), [text]);
  return (
    <section aria-labelledby="experts">
      <h2 id="experts">Which layer is hot?</h2>
      {engines.length > 1 && (
        <p>
          <label>
            Engine{" "}
            <select value={engine} onChange={(event) => onChoose(event.currentTarget.value)}>
              {engines.map((name) => (
                <option key={name} value={name}>
                  {name}
                </option>
              ))}
            </select>
          </label>
        </p>
      )}
      {!experts || experts.problem ? (
        <p class="soft">{engines.length === 0 ? "No engine has an agent that counts experts." : (experts?.problem ?? "Asking …")}</p>
      ) : (
        <>
          <Summary experts={experts} bytes={bytes} isRank={isRank} />
          <fieldset class="switch">
            <legend>Load of a layer by</legend>
            {(["rank", "expert"] as const).map((each) => (
              <label key={each}>
                <input type="radio" name="view" checked={view === each} onChange={() => setView(each)} /> {each}
              </label>
            ))}
          </fieldset>
          <HeatMap
            bytes={bytes}
            columns={isRank ? experts.ranks : experts.experts}
            unit={experts.heat_unit}
            column={view}
            label={`Load by layer and ${view}, over the mean of the layer. The hottest are listed above.`}
          />
        </>
      )}
      {experts && experts.decisions.length > 0 && <Moves experts={experts} />}
    </section>
  );
}

function Summary({ experts, bytes, isRank }: { experts: ExpertsSnapshot; bytes: Uint8Array; isRank: boolean }) {
  const columns = isRank ? experts.ranks : experts.experts;
  const cells = hottest(bytes, columns, experts.heat_unit, SHOWN);
  const name = isRank ? "rank" : "expert";
  const worst = cells[0];
  return (
    <>
      <p>
        {worst ? `Layer ${worst.layer} is the hottest: its ${name} ${worst.column} has ${worst.ratio.toFixed(2)} times the mean. ` : ""}
        {experts.balance === null
          ? ""
          : `Over all ${experts.layers} layers the busiest rank has ${experts.balance.toFixed(2)} times the mean: in steps of many tokens their experts take that much longer than they could; in small ones it matters less. `}
        Mode {experts.mode}, placement {experts.version}, over {experts.steps} steps.
      </p>
      <ol class="hot" aria-label={`Hottest by layer and ${name}`}>
        {cells.map((cell) => (
          <li key={`${cell.layer}/${cell.column}`}>
            layer {cell.layer}, {name} {cell.column}: <b>{cell.ratio.toFixed(2)}</b>
          </li>
        ))}
      </ol>
      {experts.problems.map((problem) => (
        <p class="late" key={problem}>
          {problem}
        </p>
      ))}
    </>
  );
}

function Moves({ experts }: { experts: ExpertsSnapshot }) {
  return (
    <>
      <h3>Moves and what they won</h3>
      <p class="soft">
        {experts.moved} experts moved since the engine's start: {seconds(experts.won_s)} won as measured, {seconds(experts.lost_s)} spent on moving.
      </p>
      <div class="scroll" tabIndex={0} role="region" aria-label="Moves">
        <table>
          <thead>
            <tr>
              <th scope="col">when</th>
              <th scope="col">outcome</th>
              <th scope="col" class="number">experts</th>
              <th scope="col">balance</th>
              <th scope="col" class="number">gain a step predicted</th>
              <th scope="col" class="number">measured</th>
              <th scope="col" class="number">cost</th>
              <th scope="col">reason</th>
            </tr>
          </thead>
          <tbody>{experts.decisions.map(Move)}</tbody>
        </table>
      </div>
    </>
  );
}

const ratio = (value: number | null) => (value === null ? "–" : value.toFixed(2));

function Move(row: ExpertMove) {
  return (
    <tr key={row.number}>
      <td>{clock(row.at_s)}</td>
      <td>{row.outcome}</td>
      <td class="number">{row.moves}</td>
      <td>{row.balance_before === null ? "–" : `${ratio(row.balance_before)} → ${ratio(row.balance_after)}`}</td>
      <td class="number">{seconds(row.predicted_gain_s)}</td>
      <td class="number">{seconds(row.measured_gain_s)}</td>
      <td class="number">{seconds(row.cost_s)}</td>
      <td class="reason">{row.reason}</td>
    </tr>
  );
}
