"""The load of the bench on a real group: waves of requests of one topic, and the figures of a window of waves.

In a wave all users ask at once and all wait for the last answer: a closed loop whose steps are alike. Its first steps
compute the prompts, the others decode for all users together. Texts of one topic use some experts more than others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from moe_contract.input_errors import InputError, InvalidInput, unknown_choice
from moe_tools.prompts import PromptMaker
from moe_tools.replay import AnsweredRequest, FailedRequest, Load, ReplayResult, replay
from moe_tools.server import POOL_PIECE_CHARACTERS, call_json, discover_model
from moe_tools.streaming import ServerAddress
from moe_tools.traces import TraceRequest

from moe_lab.experts.recording import TOPICS, topic_texts


@dataclass(frozen=True, slots=True, kw_only=True)
class WaveSettings:
    """A wave: requests at once, and tokens of each prompt and of each answer."""

    users: int = 32
    prompt_tokens: int = 64
    output_tokens: int = 128

    @property
    def requests(self) -> tuple[TraceRequest, ...]:
        """The requests of one wave, one for each user, all due at once."""
        one = TraceRequest(arrival_s=0.0, prompt_tokens=self.prompt_tokens, output_tokens=self.output_tokens)
        return (one,) * self.users


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Waves under one placement.

    Attributes:
        waves: their results.
        steps: that the engine made for them, of the rank that made most.
        balance: busiest rank over the mean, as the engine says at the end.
        by_rank: tokens of each rank over the mean.
        engine_gain_s: seconds a step that the engine says the change to this placement won; None where it changed
            nothing or did not measure.
    """

    waves: tuple[ReplayResult, ...]
    steps: int
    balance: float
    by_rank: tuple[float, ...] = ()
    engine_gain_s: float | None = None

    @property
    def answered(self) -> list[AnsweredRequest]:
        """All requests that got their answer."""
        return [row for wave in self.waves for row in wave.answered]

    @property
    def failed(self) -> list[FailedRequest]:
        """Requests of all waves that got no whole answer."""
        return [row for wave in self.waves for row in wave.failed]

    @property
    def wall_s(self) -> float:
        """Without the pauses between waves."""
        return sum(wave.wall_s for wave in self.waves)


async def prepare_waves(url: str, topic: str, settings: WaveSettings, seed: int) -> Load:
    """Asks the server for its model and for the tokens of the topic's text.

    Raises:
        InvalidInput: no such server, or its model does not take so long a request.
    """
    endpoint = ServerAddress.parse(url)
    served = await discover_model(endpoint)
    asked = settings.prompt_tokens + settings.output_tokens
    if served.max_tokens is not None and asked > served.max_tokens:
        message = f"prompt and answer have {asked} tokens, {served.name} takes {served.max_tokens}"
        raise InvalidInput([InputError("--prompt-tokens", message)])
    text = topic_texts()[topic]
    ids: list[int] = []
    for start in range(0, len(text), POOL_PIECE_CHARACTERS):
        body = {
            "model": served.name,
            "prompt": text[start : start + POOL_PIECE_CHARACTERS],
            "add_special_tokens": False,
        }
        ids.extend((await call_json(endpoint, "POST", "/tokenize", body))["tokens"])
    return Load(endpoint=endpoint, model=served.name, prompts=PromptMaker(tuple(ids), seed & 0xFFFFFFFF))


def check_topic(topic: str) -> None:
    """Refuses a topic of which there is no text.

    Raises:
        InvalidInput: it is unknown.
    """
    if topic not in TOPICS:
        raise InvalidInput([unknown_choice("--topic", topic, TOPICS)])


async def run_wave(load: Load, settings: WaveSettings, salt: int) -> ReplayResult:
    """One wave; equal salts have equal prompts."""
    return await replay(settings.requests, load.salted(salt))


def step_ms(window: Window) -> float | None:
    """Mean over all steps, those of the prompts included."""
    return window.wall_s * 1e3 / window.steps if window.steps else None


def decode_step_ms(window: Window) -> float | None:
    """Mean over the waves: from the last first token of a wave on, all of its steps decode."""
    latest = [max(wave.answered, key=lambda row: row.ttft_s) for wave in window.waves if wave.answered]
    return _mean_ms([row.tpot_s for row in latest])


def tpot_ms(window: Window) -> float | None:
    """Returns the mean time per output token of the answered requests in ms; None without one."""
    return _mean_ms([row.tpot_s for row in window.answered])


def ttft_ms(window: Window) -> float | None:
    """Mean over all requests: the steps of the prompts, in which the experts have most to do."""
    return _mean_ms([row.ttft_s for row in window.answered])


def output_tokens_per_s(window: Window) -> float | None:
    """Returns output tokens of answered requests per second of the window; None without any."""
    tokens = sum(row.output_tokens for row in window.answered)
    return tokens / window.wall_s if tokens else None


def _mean_ms(values: Sequence[float | None]) -> float | None:
    known = [value * 1e3 for value in values if value is not None]
    return fmean(known) if known else None
