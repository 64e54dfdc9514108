// Generated from contract/moe_contract/live_page.py by `make generate`.

/** One engine that the request was sent to. */
export interface AttemptRecord {
  name: string;
  rank: number;
  continued: string;
  reason: string;
  after_s: number;
  predicted_s: number;
  targets: readonly TargetTerms[];
  more_targets: number;
}

/** One data-parallel rank of one engine. */
export interface EngineRow {
  name: string;
  rank: number;
  group: string;
  role: string;
  status: string;
  words: string;
  in_flight: number;
  running: number;
  waiting: number;
  waiting_prefill_tokens: number;
  kv_usage: number | null;
  preemptions: number;
  step_s: number | null;
  tokens_per_s: number | null;
  signal_age_s: number | null;
  signal_source: string;
  ttft_factor: number;
  expert_balance: number;
}

/** One decision about the placement of experts. */
export interface ExpertMove {
  number: number;
  at_s: number;
  outcome: string;
  reason: string;
  moves: number;
  predicted_gain_s: number | null;
  measured_gain_s: number | null;
  cost_s: number | null;
  balance_before: number | null;
  balance_after: number | null;
}

/** The event `experts`: those of one engine, when they have changed. */
export interface ExpertsSnapshot {
  engine: string;
  problem: string;
  mode: string;
  ranks: number;
  layers: number;
  experts: number;
  version: number;
  steps: number;
  heat_unit: number;
  by_expert: string;
  by_rank: string;
  balance: number | null;
  layer_balance: readonly number[];
  decisions: readonly ExpertMove[];
  moved: number;
  won_s: number;
  lost_s: number;
  problems: readonly string[];
}

/** Held requests of one class and tenant. */
export interface HeldGroup {
  priority: number;
  tenant: string;
  requests: number;
  prompt_tokens: number;
  oldest_s: number;
}

/** The event `history`, the first of a stream. */
export interface History {
  points: readonly TimePoint[];
}

/** The event `snapshot`, once a second. */
export interface LiveSnapshot {
  at_s: number;
  pod: string;
  gateways: readonly string[];
  models: readonly string[];
  accepting: boolean;
  draining: boolean;
  hold_limit: number;
  hold_timeout_s: number;
  wait_s: number | null;
  ttft_target_s: number | null;
  step_target_s: number | null;
  policy: string;
  order: string;
  requests: number;
  failed: number;
  refused: number;
  refused_status: number;
  retried: number;
  point: TimePoint;
  engines: readonly EngineRow[];
  held: readonly HeldGroup[];
  newest: readonly RequestRow[];
  findings: readonly PageFinding[];
  events: readonly PageEvent[];
}

/** A change that was seen while somebody watched. */
export interface PageEvent {
  at_s: number;
  message: string;
  severity: "error" | "warning" | "info";
}

/** Something that is not as it should be, or that explains what users see. */
export interface PageFinding {
  kind: string;
  severity: "error" | "warning" | "info";
  message: string;
  advice: string;
}

/** The whole answer. */
export interface RequestRecord {
  request_id: string;
  route: string;
  model: string | null;
  prompt_tokens: number;
  priority: number;
  attempts: readonly AttemptRecord[];
  status: number | null;
  problem: string;
  ttft_s: number | null;
  duration_s: number | null;
}

/** A request that is held, or one of the newest that were sent to an engine. */
export interface RequestRow {
  arrived_at_s: number;
  record: RequestRecord;
  chosen: TargetTerms | null;
  other: TargetTerms | null;
  engines: number;
  held_s: number | null;
}

/** The prediction for one target at the moment of a choice, term by term. */
export interface TargetTerms {
  name: string;
  rank: number;
  requests: number;
  ahead_tokens: number;
  uncached_tokens: number;
  fresh: boolean;
  kv_s: number;
  wait_s: number;
  predicted_s: number;
}

/** One second of the gateway. */
export interface TimePoint {
  at_s: number;
  ttft_s: number | null;
  ttft_p95_s: number | null;
  step_s: number | null;
  requests_per_s: number;
  tokens_per_s: number | null;
  held: number;
  in_flight: number;
}

export interface Events {
  history: History;
  snapshot: LiveSnapshot;
  experts: ExpertsSnapshot;
}
