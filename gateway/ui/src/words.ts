// Numbers and reasons in words. Pure: tested in words.test.ts.

import type { RequestRow, TimePoint } from "./contract";

export function seconds(value: number | null | undefined): string {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 100) return `${value.toFixed(0)} s`;
  if (size >= 10) return `${value.toFixed(1)} s`;
  if (size >= 1) return `${value.toFixed(2)} s`;
  if (size >= 0.1) return `${(value * 1e3).toFixed(0)} ms`;
  if (size >= 0.001) return `${(value * 1e3).toFixed(1)} ms`;
  return size === 0 ? "0 ms" : `${(value * 1e6).toFixed(0)} µs`;
}

export function count(value: number | null | undefined): string {
  if (value === null || value === undefined) return "–";
  if (value >= 1e6) return `${(value / 1e6).toFixed(1)} M`;
  if (value >= 1e4) return `${(value / 1e3).toFixed(1)} k`;
  return value >= 100 || Number.isInteger(value) ? value.toFixed(0) : value.toFixed(1);
}

export function clock(atS: number): string {
  return new Date(atS * 1e3).toLocaleTimeString([], { hour12: false });
}

export const place = (name: string, rank: number): string => (rank ? `${name} rank ${rank}` : name);

const REASONS: Record<string, string> = {
  least_predicted: "it had the least predicted time to first token",
  session: "the session's last request went there",
  least_requests: "it had the fewest requests",
  turn: "it was its turn",
  prefill: "it computes prompts for others",
  decode: "it goes on from a prompt that was computed elsewhere",
};

const CHOICES: Record<string, string> = {
  predicted: "the least predicted time to first token",
  leastRequests: "the fewest requests",
  roundRobin: "turns",
};
const ORDERS: Record<string, string> = {
  sjf: "the shortest uncached prompt first, with a bound on waiting",
  fcfs: "arrival",
  priority: "priority, then arrival",
};

/** The policies in force: their names and their meaning. */
export function policies(choice: string, order: string): string {
  const named = (name: string, words: Record<string, string>) => (words[name] ? `${words[name]} (${name})` : name);
  return `Engines are chosen by ${named(choice, CHOICES)}, queues are ordered by ${named(order, ORDERS)}.`;
}

type Attempt = RequestRow["record"]["attempts"][number];

interface Stages {
  readonly failed: readonly Attempt[];
  readonly prefill?: Attempt;
  readonly last: Attempt | undefined;
  readonly continued: readonly Attempt[];
}

/**
 * The attempts before the first token: those that failed, the one that computed the prompt for another engine, and the
 * one that the token came from; then those where the stream went on. Of those that there are.
 */
function stages(attempts: readonly Attempt[]): Stages {
  const continued = attempts.filter((attempt) => attempt.continued);
  const begun = attempts.filter((attempt) => !attempt.continued);
  const last = begun[begun.length - 1];
  const before = begun[begun.length - 2];
  if (last?.reason !== "decode" || before?.reason !== "prefill") return { failed: begun.slice(0, -1), last, continued };
  return { failed: begun.slice(0, -2), prefill: before, last, continued };
}

export interface Part {
  readonly kind: "held" | "prefill" | "ahead" | "own" | "over" | "rest";
  readonly label: string;
  readonly seconds: number;
}

/** Predicted seconds from its arrival to its first token, by its last attempt; null where it was sent nowhere. */
export function predictedS({ record }: RequestRow): number | null {
  const { prefill, last } = stages(record.attempts);
  if (!last) return null;
  return prefill ? prefill.after_s + prefill.predicted_s + last.predicted_s : last.after_s + last.predicted_s;
}

/** Seconds since a request came that has not ended. */
export const waited = (row: RequestRow, nowS: number): number => Math.max(0, nowS - row.arrived_at_s);

/** The time of a request until its first token by term, and the rest of its answer; of one that runs, until now. */
export function partsOf(row: RequestRow, nowS: number): Part[] {
  const { record } = row;
  const { failed, prefill, last, continued } = stages(record.attempts);
  // Terms are of the last attempt, and of a whole request.
  const chosen = prefill || continued.length ? null : row.chosen;
  const runs = record.status === null;
  const parts: Part[] = [];
  const add = (kind: Part["kind"], label: string, value: number) => {
    if (value > 0) parts.push({ kind, label, seconds: value });
  };
  if (!last || row.held_s !== null) {
    if (runs) add("held", last ? "so far, most of it before an engine could take it again" : "in the gateway so far", waited(row, nowS));
    return parts;
  }
  const until = runs ? waited(row, nowS) : record.duration_s;
  add("held", failed.length ? "before it was sent there, failed engines included" : "in the gateway", (prefill ?? last).after_s);
  if (prefill) add("prefill", `its prompt, at ${place(prefill.name, prefill.rank)}`, last.after_s - prefill.after_s);
  if (record.ttft_s !== null) {
    const measured = Math.max(0, record.ttft_s - last.after_s);
    const wait = Math.min(chosen?.wait_s ?? 0, measured);
    const own = Math.min(Math.max(0, last.predicted_s - (chosen?.wait_s ?? 0)), measured - wait);
    add("ahead", "behind other prompts at the engine, predicted", wait);
    const words = prefill ? "its KV blocks and the first token, predicted" : "at the engine, as predicted";
    add("own", chosen ? "its own prompt, predicted" : words, own);
    add("over", "longer than predicted", measured - wait - own);
    add("rest", runs ? "of its answer so far" : "rest of the answer", (until ?? record.ttft_s) - record.ttft_s);
  } else if (until !== null) {
    const words = isAnswer(row) ? "at the engine: the answer came in one piece" : `at the engine, without a first token${runs ? " so far" : ""}`;
    add("rest", words, until - last.after_s);
  }
  return parts;
}

/** Whether it ended with an answer. */
const isAnswer = (row: RequestRow): boolean => row.record.status !== null && row.record.status < 400;

/** What is explained beside the request itself: the time, and how the hold queue is. */
export interface Now {
  readonly at_s: number;
  readonly accepting: boolean;
  readonly hold_timeout_s: number;
}

/** Why a request took as long as it did until its first token, in sentences. */
export function explain(row: RequestRow, now: Now): string[] {
  const nowS = now.at_s;
  const { record } = row;
  const { failed, last } = stages(record.attempts);
  if (row.held_s !== null) {
    const again = last ? ` It was sent to ${record.attempts.map((each) => place(each.name, each.rank)).join(", ")} before.` : "";
    const why = now.accepting ? "every engine that could take it is saturated" : "no engine takes requests now";
    return [`It is held in the gateway for ${seconds(row.held_s)} so far: ${why}. After ${seconds(now.hold_timeout_s)} it would be refused.${again}`];
  }
  if (!last) {
    if (record.status === null) return [`It came ${seconds(waited(row, nowS))} ago and was sent to no engine yet.`];
    const stay = record.duration_s === null ? "" : ` It was ${seconds(record.duration_s)} in the gateway.`;
    return [`It was sent to no engine${record.problem ? `: ${record.problem}` : ""}.${stay}`];
  }
  const there = place(last.name, last.rank);
  const said = [measured(row, there, nowS)];
  const before = partsOf(row, nowS).filter((part) => part.kind !== "rest");
  const largest = before.reduce<Part | null>((most, part) => (most && most.seconds >= part.seconds ? most : part), null);
  if (largest && record.ttft_s !== null) said.push(mainCause(row, largest));
  if (failed.length) said.push(`Before, it was sent to ${failed.map((each) => place(each.name, each.rank)).join(", ")}.`);
  said.push(...whyThere(row));
  if (record.problem) said.push(`It ended with status ${record.status ?? "–"}: ${record.problem}.`);
  return said;
}

/** Why it went to its engine. */
function whyThere({ record, chosen, other }: RequestRow): string[] {
  const { prefill, last, continued } = stages(record.attempts);
  const there = place(last!.name, last!.rank);
  if (continued.length) {
    const later = continued.map((each) => `${place(each.name, each.rank)} after ${seconds(each.after_s)}`).join(", ");
    return [`It went to ${there} since ${REASONS[last!.reason] ?? last!.reason}. Its stream went on at ${later}.`];
  }
  if (prefill) return [`${place(prefill.name, prefill.rank)} computed its prompt, and ${there} answers with the KV blocks from there.`];
  const beside = other ? ` The best other one, ${place(other.name, other.rank)}, was predicted ${seconds(other.predicted_s)}.` : "";
  const said = [`It went to ${there} since ${REASONS[last!.reason] ?? last!.reason}.${beside}`];
  if (!chosen) said.push("The terms of this choice were not recorded: at most one choice in 10 ms is.");
  return said;
}

function measured(row: RequestRow, there: string, nowS: number): string {
  const { record } = row;
  const last = stages(record.attempts).last!;
  const predicted = seconds(predictedS(row));
  if (record.ttft_s !== null) {
    const runs = record.status === null ? ` It is answered at ${there}, for ${seconds(waited(row, nowS))} in all so far.` : "";
    return `Its first token came after ${seconds(record.ttft_s)}; predicted were ${predicted}.${runs}`;
  }
  if (record.duration_s !== null && !isAnswer(row)) {
    return `It ended after ${seconds(record.duration_s)} without a first token, which was predicted after ${predicted}.`;
  }
  if (record.duration_s !== null) {
    return `Its answer came in one piece after ${seconds(record.duration_s)}; the first token was predicted after ${predicted}.`;
  }
  if (last.reason === "prefill") {
    return `Its prompt is computed at ${there}, for another engine to go on from, for ${seconds(waited(row, nowS))} so far. ${seconds(last.predicted_s)} were predicted.`;
  }
  const late = waited(row, nowS) - last.after_s - last.predicted_s;
  const beyond = late > 0 ? `, ${seconds(late)} ago` : "";
  return `It waits at ${there} for ${seconds(waited(row, nowS))} so far. Its first token was predicted after ${predicted}${beyond}; an answer in one piece has none.`;
}

function mainCause(row: RequestRow, part: Part): string {
  const share = Math.round((100 * part.seconds) / Math.max(row.record.ttft_s ?? 0, 1e-9));
  const most = share > 50 ? "Most of that time" : "The longest part of that time";
  const size = `${seconds(part.seconds)}, ${Math.min(100, share)} % of it,`;
  const { chosen, record } = row;
  const { failed, prefill, continued } = stages(record.attempts);
  switch (part.kind) {
    case "prefill":
      return `${most} its prompt was computed at ${place(prefill!.name, prefill!.rank)}: ${size} ${seconds(prefill!.predicted_s)} were predicted.`;
    case "held":
      return failed.length
        ? `${most} went to engines that failed it or to waiting for another: ${size} passed before it was sent there.`
        : `${most} it was held in the gateway until an engine could take it: ${size} passed so.`;
    case "ahead":
      return chosen && chosen.kv_s > chosen.wait_s / 2
        ? `${most} it waited for KV blocks: ${size} were predicted for it.`
        : `${most} it waited behind ${count(chosen?.ahead_tokens)} prompt tokens of other requests: ${size} were predicted for it.`;
    case "own":
      if (prefill) return `${most} was predicted: ${size} for its KV blocks and the first token.`;
      if (!chosen || continued.length) return `${most} was predicted: ${size} for the prompts before it and its own.`;
      return `${most} its own prompt was computed: ${size} for ${count(chosen?.uncached_tokens ?? record.prompt_tokens)} tokens that were not in the cache.`;
    default:
      return `${most} was not predicted: ${size} more than its engine's step times say.`;
  }
}

// A request that waits for so long without a first token is shown by itself.
const LONG_WAIT_S = 5;

/** The request whose wait is explained: one that waits for long and longest, else the last that ended, else the newest. */
export function pick(rows: readonly RequestRow[], nowS: number): RequestRow | undefined {
  const waiting = rows.filter((row) => row.record.status === null && row.record.ttft_s === null);
  const longest = waiting.reduce<RequestRow | undefined>((most, row) => (most && most.arrived_at_s <= row.arrived_at_s ? most : row), undefined);
  const last = rows.find((row) => row.record.status !== null);
  const enough = Math.max(LONG_WAIT_S, last?.record.ttft_s ?? last?.record.duration_s ?? 0);
  return longest && waited(longest, nowS) > enough ? longest : (last ?? rows[0]);
}

/** Places of the values that have none beside them. */
export function alone(values: readonly (number | null | undefined)[]): number[] {
  const there = (at: number) => values[at] !== null && values[at] !== undefined;
  return [...values.keys()].filter((at) => there(at) && !there(at - 1) && !there(at + 1));
}

// Points come each second; a longer pause is no line of a chart.
const LONGEST_PAUSE_S = 2.5;

/** The points with null where some are missing, and the times of both. */
export function withGaps(points: readonly TimePoint[]): { times: number[]; points: (TimePoint | null)[] } {
  const found: { times: number[]; points: (TimePoint | null)[] } = { times: [], points: [] };
  points.forEach((point, number) => {
    const before = points[number - 1];
    if (before && point.at_s - before.at_s > LONGEST_PAUSE_S) {
      found.times.push((before.at_s + point.at_s) / 2);
      found.points.push(null);
    }
    found.times.push(point.at_s);
    found.points.push(point);
  });
  return found;
}

export interface Cell {
  readonly layer: number;
  readonly column: number;
  readonly ratio: number;
}

/** Load over the mean by [layer, column] from base64 of bytes. */
export function unpack(text: string): Uint8Array {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let place = 0; place < raw.length; place++) bytes[place] = raw.charCodeAt(place);
  return bytes;
}

/** The cells with the highest load over the mean of their layer, the highest first. */
export function hottest(bytes: Uint8Array, columns: number, unit: number, most: number): Cell[] {
  const order = Array.from(bytes.keys()).sort((a, b) => bytes[b]! - bytes[a]! || a - b);
  return order.slice(0, most).map((at) => ({ layer: Math.floor(at / columns), column: at % columns, ratio: bytes[at]! * unit }));
}
