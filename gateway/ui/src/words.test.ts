import assert from "node:assert/strict";
import { test } from "node:test";
import type { RequestRow, TargetTerms } from "./contract";
import { count, explain, hottest, partsOf, seconds, unpack } from "./words";

const TERMS: TargetTerms = {
  name: "a", rank: 0, requests: 3, ahead_tokens: 900, uncached_tokens: 40, fresh: true, kv_s: 0, wait_s: 1, predicted_s: 1.2,
};

function request(changes: Partial<RequestRow["record"]>, row: Partial<RequestRow> = {}): RequestRow {
  return {
    arrived_at_s: 0,
    chosen: TERMS,
    other: { ...TERMS, name: "b", predicted_s: 2 },
    engines: 2,
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
    const parts = partsOf(request({ ttft_s: ttft, duration_s: 10 }));
    const sum = parts.reduce((total, part) => total + part.seconds, 0);
    assert.ok(Math.abs(sum - Math.max(10, ttft)) < 0.06, `${ttft}: ${sum}`);
    assert.ok(parts.every((part) => part.seconds > 0));
  }
});

test("the main cause is the largest part before the first token", () => {
  assert.match(explain(request({})).join(" "), /waited behind 900 prompt tokens of other requests: 1\.00 s, 67 %/);
  assert.match(explain(request({}, { chosen: { ...TERMS, kv_s: 0.9 } })).join(" "), /waited for KV blocks/);
  assert.match(explain(request({ ttft_s: 9 })).join(" "), /was not predicted/);
  const held = { ...request({}).record.attempts[0]!, after_s: 5 };
  assert.match(explain(request({ ttft_s: 6.2, attempts: [held] })).join(" "), /held in the gateway/);
  assert.match(explain(request({}, { chosen: { ...TERMS, wait_s: 0 } })).join(" "), /own prompt was computed/);
});

test("a request without an engine, an end or terms is described too", () => {
  const unsent = explain(request({ attempts: [], problem: "queue_full", ttft_s: null }));
  assert.deepEqual(unsent, ["It was sent to no engine: queue_full. It was 4.00 s in the gateway."]);
  const left = request({ ttft_s: null, status: 499, problem: "the client closed the connection" });
  assert.match(explain(left).join(" "), /ended after 4\.00 s without a first token/);
  assert.equal(partsOf(left).at(-1)!.label, "at the engine, without a first token");
  assert.match(explain(request({ ttft_s: null, duration_s: null, status: null })).join(" "), /It runs at a/);
  assert.match(explain(request({ ttft_s: null })).join(" "), /one piece after 4\.00 s/);
  assert.match(explain(request({}, { chosen: null, other: null })).join(" "), /not recorded/);
});

test("numbers are short", () => {
  assert.deepEqual([0, 0.00002, 0.0123, 0.123, 1.234, 250].map(seconds), ["0 ms", "20 µs", "12.3 ms", "123 ms", "1.23 s", "250 s"]);
  assert.deepEqual([null, 3, 3.14, 1234, 12345, 2e6].map(count), ["–", "3", "3.1", "1234", "12.3 k", "2.0 M"]);
});

test("the hottest cells are those of the largest bytes", () => {
  const bytes = unpack(btoa(String.fromCharCode(32, 64, 16, 96)));
  assert.deepEqual(hottest(bytes, 2, 1 / 32, 2), [{ layer: 1, column: 1, ratio: 3 }, { layer: 0, column: 1, ratio: 2 }]);
});
