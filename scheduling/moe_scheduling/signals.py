"""The frozen snapshots of engines that decisions read.

Written by the node agent's scheduler plugin at every engine step, carried over HTTP as JSON with these field names,
read by `engine/` and `fleet/`. One snapshot describes one dispatch target: one data-parallel rank of one server.
"""

from dataclasses import dataclass
from typing import NamedTuple


class Target(NamedTuple):
    """Where a request can be sent: data-parallel rank `rank` of the server named `server`.

    A tuple because it is a key of look-ups for each request: it hashes several times faster than a frozen dataclass.
    """

    server: str
    rank: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Step-time model of an engine, in seconds.

    `base_s + decode_s * decoding_requests + decode_root_s * sqrt(decoding_requests)`, and in steps with prompt tokens
    `+ prefill_base_s + prefill_s * prefill_tokens`.

    Attributes:
        base_s: seconds of an empty step.
        prefill_s: seconds for each prefill token in the step.
        decode_s: seconds for each decoding request in the step.
        decode_root_s: seconds for the square root of the decoding requests: the more of them decode, the fewer experts
            are left whose weights only the next one would read.
        prefill_base_s: seconds that any prompt tokens add: on GPUs vLLM runs steps that only decode as one captured
            graph, and launches the kernels of other steps.
    """

    base_s: float
    prefill_s: float
    decode_s: float
    decode_root_s: float = 0.0
    prefill_base_s: float = 0.0

    def decode_step_s(self, requests: float) -> float:
        """Returns the seconds of a step in which this many requests, at least 0, decode and no prompt is computed."""
        # Called for each request where engines send no signals, so without a call of its own.
        root: float = requests**0.5
        return self.base_s + self.decode_s * requests + self.decode_root_s * root

    def step_s(self, prefill_tokens: int, requests: int) -> float:
        """Returns the seconds of a step with these prompt tokens and decoding requests."""
        prompts_s = self.prefill_base_s + self.prefill_s * prefill_tokens if prefill_tokens else 0.0
        return prompts_s + self.decode_step_s(requests)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSignal:
    """State of one data-parallel rank at the end of a step.

    Attributes:
        step: number of the step, rising by one at each; 0 before the first.
        running: requests in the running set.
        waiting: requests in the waiting queues.
        waiting_prefill_tokens: prompt tokens of waiting requests that are not in the prefix cache.
        running_prefill_tokens: prompt tokens of running requests that are not yet computed.
        scheduled_prefill_tokens: those of them that are in scheduled steps, which a new request cannot join any more.
        busy_s: predicted seconds until the scheduled steps have ended; 0 without any, or where it is not known.
        step_tokens: tokens that a step holds at most, vLLM's `max_num_batched_tokens`; 0: not known.
        decode_tokens: output tokens of a step, which is the number of decoding requests.
        kv_usage: used part of the KV blocks, 0 to 1.
        kv_tokens: tokens for which the KV cache has room, or its tier in the host's memory where that is larger; 0: not
            known.
        preemptions: preempted requests since the engine started.
        computed_tokens: prompt and output tokens computed since the engine started.
        step_time: the fitted step-time model; None until enough steps were seen.
        expert_balance: max / mean of the tokens over expert-parallel ranks, at least 1, where 1 is balanced. Shown to
            people; no decision reads it.
        expert_pressure: expert tokens of this rank / mean over its group's ranks; 1 without a group. Shown likewise.
    """

    step: int = 0
    running: int = 0
    waiting: int = 0
    waiting_prefill_tokens: int = 0
    running_prefill_tokens: int = 0
    scheduled_prefill_tokens: int = 0
    busy_s: float = 0.0
    step_tokens: int = 0
    decode_tokens: int = 0
    kv_usage: float = 0.0
    kv_tokens: int = 0
    preemptions: int = 0
    computed_tokens: int = 0
    step_time: StepTime | None = None
    expert_balance: float = 1.0
    expert_pressure: float = 1.0
