"""TTFT model of an engine: from its step-time model and its load to the seconds until a prompt is computed.

Built by `TargetState` when a signal arrives, which is rarer than a choice; evaluated by `choice.py` for each request.

Invariants: given a plausible signal and step-time model, no coefficient is negative, infinite or NaN.
"""

from typing import NamedTuple

from moe_scheduling.signals import EngineSignal, StepTime

# Token budget of a step until a signal says it: vLLM's default for online serving on all but the largest GPUs.
STEP_PREFILL_TOKENS = 2048
# Step-time model until some engine has a fitted one: a middling MoE model on one GPU. It is the same for all targets,
# so it prefers none of them.
DEFAULT_STEP_TIME = StepTime(base_s=0.01, prefill_s=0.00005, decode_s=0.0001)
# KV use, 0 to 1, from which new requests begin to wait for blocks: theta_k of Gimbal (arXiv 2602.21626).
KV_PRESSURE_FROM = 0.9
# Decode steps until running requests leave blocks for a new one when no block is free. Outputs are some hundred tokens
# long, and in a full batch some request is always near its end. Set by hand, not calibrated.
KV_PRESSURE_STEPS = 64


class TtftModel(NamedTuple):
    """Seconds until the first token, as a function of the prompt tokens to compute.

    Attributes:
        token_s: seconds for each prefill token.
        step_s: seconds of a step with prompt tokens, apart from them.
        kv_s: seconds until there are KV blocks for a new request.
        step_tokens: tokens that a step holds at most, at least 1.
    """

    token_s: float
    step_s: float
    kv_s: float
    step_tokens: int = STEP_PREFILL_TOKENS

    def first_token_s(self, tokens: int) -> float:
        """Returns the seconds until a prompt is computed.

        `kv_s + token_s * tokens + step_s * ceil(tokens / step_tokens)`: prefill is bound by compute, so it takes the
        time of its tokens, and the fixed part of as many steps as the budget makes of them.

        Args:
            tokens: prompt tokens ahead, and its own uncached ones.
        """
        token_s, step_s, kv_s, step_tokens = self
        return kv_s + token_s * tokens - step_s * (-tokens // step_tokens)

    def wait_s(self, ahead_tokens: int) -> float:
        """Returns the seconds until a prompt begins to be computed, behind `ahead_tokens` prompt tokens.

        The last, partly filled step of the tokens ahead is shared with it, so only full steps count.
        """
        token_s, step_s, kv_s, step_tokens = self
        return kv_s + token_s * ahead_tokens + step_s * (ahead_tokens // step_tokens)

    def times(self, ttft_factor: float) -> "TtftModel":
        """Returns the model of an engine that takes `ttft_factor` times as long for everything."""
        if ttft_factor == 1.0:
            return self
        token_s, step_s, kv_s, step_tokens = self
        return TtftModel(ttft_factor * token_s, ttft_factor * step_s, ttft_factor * kv_s, step_tokens)


def build_ttft_model(step_time: StepTime, signal: EngineSignal) -> TtftModel:
    """Returns the TTFT model of an engine in the state of `signal`.

    Expert balance is not used: a lasting imbalance is in the fitted step time already, and a term for what changed
    since was worth at most 1 % of the mean TTFT (docs/scheduling.md).

    Args:
        step_time: the step-time model of the engine.
        signal: its state; decoding requests, KV use and the size of a step are read.
    """
    step_s = step_time.decode_step_s(signal.decode_tokens)
    above = max(0.0, signal.kv_usage - KV_PRESSURE_FROM) / (1.0 - KV_PRESSURE_FROM)
    kv_s, step_tokens = KV_PRESSURE_STEPS * step_s * above, signal.step_tokens or STEP_PREFILL_TOKENS
    return TtftModel(step_time.prefill_s, step_time.prefill_base_s + step_s, kv_s, step_tokens)


def build_unsignalled_ttft_model(step_time: StepTime, decoding_requests: int, step_tokens: int) -> TtftModel:
    """Returns the TTFT model of an engine without a fresh signal, from the requests that are known to decode there.

    Args:
        step_time: the step-time model of the engine.
        decoding_requests: that are known.
        step_tokens: most tokens of a step.
    """
    step_s = step_time.prefill_base_s + step_time.decode_step_s(decoding_requests)
    return TtftModel(step_time.prefill_s, step_s, 0.0, step_tokens)
