"""How fast an engine computes a prompt at the moment: what its step-time line, load and pressures come to.

Made by `books.py` when a signal comes, which is rarer than a choice; read by `engine.py`.

Invariants: no part of a pace is negative, endless or NaN, given a plausible signal and line.
"""

from typing import NamedTuple

from moe_scheduling.signals import EngineSignal, StepTime

# Budget of prefill tokens in a step: vLLM's default for online serving on all but the largest GPUs. Where the budget is
# greater, fewer steps are made than predicted here, on every target alike.
STEP_PREFILL_TOKENS = 2048
# Until some engine has a fitted line: a middling model on one GPU. Alike for all targets, so it prefers none of them.
DEFAULT_STEP_TIME = StepTime(base_s=0.01, prefill_s=0.00005, decode_s=0.0001)
# KV use from which new requests begin to wait for blocks: theta_k of Gimbal (arXiv 2602.21626).
KV_PRESSURE_FROM = 0.9
# Decode steps until running requests leave blocks for a new one when there are none left. Outputs are some hundred
# tokens long, and in a full batch some request is always near its end.
KV_PRESSURE_STEPS = 64
# Steps after which an observation weighs 1/e in an engine's step-time line (`moe_agent.step_time` fits it so).
LINE_MEMORY_STEPS = 500.0
# Part of a prompt's computation that routed experts have: 20.4 of 37 billion active parameters in DeepSeek-V3, 1.8 of
# 3.3 in Qwen3-30B-A3B (layers * experts a token * 3 * hidden size * width of an expert, by the published shapes).
EXPERT_PART = 0.55


class TtftModel(NamedTuple):
    """The time that a prompt takes is `token_s` for each token and `step_s` for each step, after `kv_s`.

    Attributes:
        token_s: seconds for each prefill token.
        step_s: seconds of a step but for its prefill tokens.
        kv_s: seconds until there are KV blocks for a new request.
    """

    token_s: float
    step_s: float
    kv_s: float

    def first_token_s(self, tokens: int) -> float:
        """Seconds until a prompt is computed, `tokens` being its own and those ahead of it.

        `kv_s + token_s * tokens + step_s * ceil(tokens / STEP_PREFILL_TOKENS)`: prefill is bound by compute, so it
        takes its tokens' time and the fixed part of as many steps as the budget makes of them.
        """
        token_s, step_s, kv_s = self
        return kv_s + token_s * tokens - step_s * (-tokens // STEP_PREFILL_TOKENS)

    def wait_s(self, ahead_tokens: int) -> float:
        """Seconds until a prompt begins to be computed; the last, unfilled step of those ahead is shared with it."""
        token_s, step_s, kv_s = self
        return kv_s + token_s * ahead_tokens + step_s * (ahead_tokens // STEP_PREFILL_TOKENS)

    def times(self, ttft_factor: float) -> "TtftModel":
        """The pace of an engine that takes so many times as long for everything."""
        if ttft_factor == 1.0:
            return self
        token_s, step_s, kv_s = self
        return TtftModel(ttft_factor * token_s, ttft_factor * step_s, ttft_factor * kv_s)


def build_ttft_model(line: StepTime, signal: EngineSignal, fitted_balance: float = 1.0) -> TtftModel:
    """The pace of an engine that works by `line`, in the state that `signal` says.

    In each layer all ranks of an expert group wait for the busiest one, so the experts' part of a step grows with the
    balance. A line has the balance in it at which it was fitted: only what changed since makes a difference. Which rank
    of a group takes a prompt changes nothing of that, since its tokens go to the same experts from any of them; so a
    rank's own `expert_pressure` is no part of it. What this is worth: docs/scheduling.md.

    Args:
        line: the engine's step-time line.
        signal: its state.
        fitted_balance: balance of its experts over the steps that the line was fitted to, at least 1.
    """
    step_s = line.base_s + line.decode_s * signal.decode_tokens
    slower = 1.0 + EXPERT_PART * (signal.expert_balance / fitted_balance - 1.0)
    above = max(0.0, signal.kv_usage - KV_PRESSURE_FROM) / (1.0 - KV_PRESSURE_FROM)
    return TtftModel(line.prefill_s * slower, step_s * slower, KV_PRESSURE_STEPS * step_s * above)


def build_unsignalled_ttft_model(line: StepTime, decoding_requests: int) -> TtftModel:
    """The pace of an engine whose state is not known but for the requests that decode there."""
    return TtftModel(line.prefill_s, line.base_s + line.decode_s * decoding_requests, 0.0)
