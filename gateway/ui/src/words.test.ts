import assert from "node:assert/strict";
import { test } from "node:test";
import type { RequestRow, TargetTerms, TimePoint } from "./contract";
import { alone, count, explain, hottest, partsOf, pick, policies, seconds, unpack, withGaps } from "./words";

const NOW_S = 20;
const NOW = { at_s: NOW_S, accepting: false, hold_timeout_s: 60 };
const TERMS: TargetTerms = {
  name: "a", rank: 0, requests: 3, ahead_tokens: 900, uncached_tokens: 40, fresh: true, kv_s: 0, wait_s: 1, predicted_s: 1.2,
};

function request(changes: Partial<RequestRow["record"]>, row: Partial<RequestRow> = {}): RequestRow {
  return {
    arrived_at_s: 0,
    chosen: TERMS,
    other: { ...TERMS, name: "b", predicted_s: 2 },
    engines: 2,
    held_s: null,
    ...row,
    record: {
      request_id: "r", route: "chat", model: "m", prompt_tokens: 40, priority: 0, status: 200, problem: "", ttft_s: 1.5, duration_s: 4,
      attempts: [{ name: "a", rank: 0, continued: "", reason: "least_predicted", after_s: 0.1, predicted_s: 1.2, targets: [], more_targets: 0 }],
      ...changes,
    },
  };
}

test("the parts of a request add up to its duration", () => {
  for (const ttft of [0.05, 0.5, 1.3, 1.5, 9]) {
    const parts = partsOf(request({ ttft_s: ttft, duration_s: 10 }), NOW_S);
    const sum = parts.reduce((total, part) => total + part.seconds, 0);
    assert.ok(Math.abs(sum - Math.max(10, ttft)) < 0.06, `${ttft}: ${sum}`);
    assert.ok(parts.every((part) => part.seconds > 0));
  }
});

test("the main cause is the largest part before the first token", () => {
  assert.match(explain(request({}), NOW).join(" "), /waited behind 900 prompt tokens of other requests: 1\.00 s, 67 %/);
  assert.match(explain(request({}, { chosen: { ...TERMS, kv_s: 0.9 } }), NOW).join(" "), /waited for KV blocks/);
  assert.match(explain(request({ ttft_s: 9 }), NOW).join(" "), /was not predicted/);
  const held = { ...request({}).record.attempts[0]!, after_s: 5 };
  assert.match(explain(request({ ttft_s: 6.2, attempts: [held] }), NOW).join(" "), /held in the gateway/);
  assert.match(explain(request({}, { chosen: { ...TERMS, wait_s: 0 } }), NOW).join(" "), /own prompt was computed/);
  assert.match(explain(request({ ttft_s: 2.4 }), NOW).join(" "), /The longest part of that time was not predicted: 1\.10 s, 46 %/);
});

test("a request without an engine, an end or terms is described too", () => {
  const unsent = explain(request({ attempts: [], problem: "queue_full", ttft_s: null }), NOW);
  assert.deepEqual(unsent, ["It was sent to no engine: queue_full. It was 4.00 s in the gateway."]);
  const left = request({ ttft_s: null, status: 499, problem: "the client closed the connection" });
  assert.match(explain(left, NOW).join(" "), /ended after 4\.00 s without a first token/);
  assert.equal(partsOf(left, NOW_S).at(-1)!.label, "at the engine, without a first token");
  
  assert.match(explain(request({ ttft_s: null }), NOW).join(" "), /one piece after 4\.00 s/);
  const unknown = explain(request({}, { chosen: null, other: null }), NOW).join(" ");
  assert.match(unknown, /Most of that time was predicted: 1\.20 s, 80 % of it, for the prompts before it and its own.*not recorded/);
});

const attempt = (changes: Partial<RequestRow["record"]["attempts"][number]>) => ({ ...request({}).record.attempts[0]!, ...changes });
const PREFILL = attempt({ name: "p", reason: "prefill", after_s: 0.1, predicted_s: 0.8 });
const DECODE = attempt({ name: "d", reason: "decode", after_s: 1.1, predicted_s: 0.2 });

test("an engine that computed the prompt for another one has failed nothing", () => {
  const split = request({ attempts: [PREFILL, DECODE] });
  const said = explain(split, NOW).join(" ");
  assert.match(said, /first token came after 1\.50 s; predicted were 1\.10 s/);
  assert.match(said, /Most of that time its prompt was computed at p: 1\.00 s, 67 % of it, 800 ms were predicted\./);
  assert.match(said, /p computed its prompt, and d answers with the KV blocks from there\./);
  assert.doesNotMatch(said, /fail|Before, it was sent|not recorded|best other/);
  assert.deepEqual(
    partsOf(split, NOW_S).map((part) => [part.kind, part.label, Math.round(part.seconds * 10) / 10]),
    [
      ["held", "in the gateway", 0.1],
      ["prefill", "its prompt, at p", 1],
      ["own", "its KV blocks and the first token, predicted", 0.2],
      ["over", "longer than predicted", 0.2],
      ["rest", "rest of the answer", 2.5],
    ],
  );
  const moved = request({ attempts: [attempt({ name: "b" }), PREFILL, DECODE] });
  assert.match(explain(moved, NOW).join(" "), /Before, it was sent to b\./);
});

test("an engine where a stream went on is not where its first token came from", () => {
  const moved = request({ attempts: [attempt({}), attempt({ name: "c", continued: "prefix", after_s: 3, predicted_s: 0.1 })] }, { chosen: null, other: null });
  const said = explain(moved, NOW).join(" ");
  assert.match(said, /first token came after 1\.50 s; predicted were 1\.30 s/);
  assert.match(said, /Most of that time was predicted: 1\.20 s, 80 %/);
  assert.match(said, /It went to a since .* Its stream went on at c after 3\.00 s\./);
  assert.doesNotMatch(said, /failed it|Before, it was sent/);
  const sum = partsOf(moved, NOW_S).reduce((total, part) => total + part.seconds, 0);
  assert.ok(Math.abs(sum - 4) < 1e-9, `${sum}`);
});

test("a request whose prompt is computed for another engine says so", () => {
  const waits = request({ ...RUNS, attempts: [PREFILL] }, { arrived_at_s: 18 });
  const said = explain(waits, NOW).join(" ");
  assert.match(said, /Its prompt is computed at p, for another engine to go on from, for 2\.00 s so far\. 800 ms were predicted\./);
  assert.doesNotMatch(said, /first token was predicted/);
});

const RUNS = { ttft_s: null, duration_s: null, status: null };

test("a request that has not ended says how long it has waited so far", () => {
  const waits = request(RUNS, { arrived_at_s: 17 });
  assert.match(explain(waits, NOW).join(" "), /It waits at a for 3\.00 s so far\. Its first token was predicted after 1\.30 s, 1\.70 s ago/);
  assert.deepEqual(partsOf(waits, NOW_S).map((part) => [part.label, part.seconds]), [["in the gateway", 0.1], ["at the engine, without a first token so far", 2.9]]);
  const answers = request({ ...RUNS, ttft_s: 1.5 }, { arrived_at_s: 10 });
  assert.match(explain(answers, NOW).join(" "), /first token came after 1\.50 s.* It is answered at a, for 10\.0 s in all so far/);
  assert.equal(partsOf(answers, NOW_S).at(-1)!.label, "of its answer so far");
  const held = request({ ...RUNS, attempts: [] }, { arrived_at_s: 12, held_s: 8 });
  assert.deepEqual(explain(held, NOW), ["It is held in the gateway for 8.00 s so far: no engine takes requests now. After 60.0 s it would be refused."]);
  assert.deepEqual(partsOf(held, NOW_S), [{ kind: "held", label: "in the gateway so far", seconds: 8 }]);
  assert.match(explain(held, { ...NOW, accepting: true }).join(" "), /every engine that could take it is saturated/);
  assert.match(explain(request(RUNS, { arrived_at_s: 12, held_s: 3 }), NOW).join(" "), /for 3\.00 s so far.* refused\. It was sent to a before/);
});

test("what is explained by itself is the last request that ended, or one that waits for long", () => {
  const ended = request({ request_id: "ended" });
  const young = request({ ...RUNS, request_id: "young" }, { arrived_at_s: 18 });
  const old = request({ ...RUNS, request_id: "old" }, { arrived_at_s: 3 });
  const answers = request({ ...RUNS, ttft_s: 1, request_id: "answers" }, { arrived_at_s: 1 });
  const picked = (...rows: RequestRow[]) => pick(rows, NOW_S)?.record.request_id;
  assert.equal(picked(young, ended), "ended");
  assert.equal(picked(young, ended, old), "old");
  assert.equal(picked(answers, ended), "ended");
  assert.equal(picked(young), "young");
  assert.equal(picked(request({ ttft_s: 30 }), old), "r", "others wait as long");
  assert.equal(picked(), undefined);
});

test("seconds that are missing are a gap of a chart", () => {
  const at = (at_s: number): TimePoint => ({ at_s, ttft_s: 1, ttft_p95_s: 1, step_s: 1, requests_per_s: 1, tokens_per_s: 1, held: 0, in_flight: 1 });
  const { times, points } = withGaps([at(1), at(2.1), at(10), at(11)]);
  assert.deepEqual(times, [1, 2.1, 6.05, 10, 11]);
  assert.deepEqual(points.map((point) => point === null), [false, false, true, false, false]);
  assert.deepEqual(withGaps([]), { times: [], points: [] });
  assert.deepEqual(alone([1, null, 2, 3, null, 4]), [0, 5], "no line shows these");
});

test("policies are named with their meaning", () => {
  assert.equal(
    policies("predicted", "sjf"),
    "Engines are chosen by the least predicted time to first token (predicted), queues are ordered by the shortest uncached prompt first, with a bound on waiting (sjf).",
  );
  assert.equal(policies("another", "new"), "Engines are chosen by another, queues are ordered by new.");
});

test("numbers are short", () => {
  assert.deepEqual([0, 0.00002, 0.0123, 0.123, 1.234, 250].map(seconds), ["0 ms", "20 µs", "12.3 ms", "123 ms", "1.23 s", "250 s"]);
  assert.deepEqual([null, 3, 3.14, 1234, 12345, 2e6].map(count), ["–", "3", "3.1", "1234", "12.3 k", "2.0 M"]);
});

test("the hottest cells are those of the largest bytes", () => {
  const bytes = unpack(btoa(String.fromCharCode(32, 64, 16, 96)));
  assert.deepEqual(hottest(bytes, 2, 1 / 32, 2), [{ layer: 1, column: 1, ratio: 3 }, { layer: 0, column: 1, ratio: 2 }]);
});
