"""llm-d's choice of an engine by predicted latency, reconstructed from its documentation.

Published (llm-d, "Latency Predictor", and the README of `prefix-cache-affinity-filter`): a model that is trained online
on answered requests predicts the time to first token at each engine from KV use, input length, queue depth, running
requests, the part of the prompt in the prefix cache, and the input tokens in flight. Engines with 0.8 of the prompt or
more in their cache are preferred, unless the best of them is predicted to be 18 s worse than the best of the others.
Without a target in the request the lowest prediction has the highest score, and the engine is drawn with the scores as
weights. Without a model queue, KV use and prefix decide.

Reconstructed: the makers' model is XGBoost, in windows by bucket; here it is linear, by least squares over the last
samples, with the uncached tokens and both parts of the tokens in flight as columns of their own, which a tree could
find. Scores are (worst - own) / (worst - best), which the documentation does not say. Its model of the time for each
output token is left out: only time to first token decides.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np
from moe_scheduling.signals import Target

from moe_tools.simulator.prefix_balancer import PrefixBalancer
from moe_tools.simulator.router import Wire
from moe_tools.simulator.workload import SimRequest

AFFINITY = 0.8
PENALTY_S = 18.0
# Samples of the window, samples before the first prediction, and new ones before the model is fitted again.
WINDOW = 1000
LEAST_SAMPLES = 50
REFIT_AFTER = 10
# Weights of queue, KV use and prefix while there is no model.
_QUEUE, _KV, _PREFIX = 2.0, 2.0, 3.0

Features = tuple[float, ...]


class LatencyModel:
    """Linear regression of seconds on features, over a window of samples."""

    def __init__(self) -> None:
        self._samples: deque[tuple[Features, float]] = deque(maxlen=WINDOW)
        self._new = 0
        self._weights: np.ndarray | None = None

    @property
    def is_known(self) -> bool:
        """Whether there were enough samples for a prediction."""
        return self._weights is not None

    def observe(self, features: Features, latency_s: float) -> None:
        """Takes a sample, and fits the model anew after each `REFIT_AFTER`."""
        self._samples.append((features, latency_s))
        self._new += 1
        if len(self._samples) >= LEAST_SAMPLES and self._new >= REFIT_AFTER:
            self._new = 0
            columns = np.array([row for row, _ in self._samples])
            seconds = np.array([value for _, value in self._samples])
            # Columns of like sizes: tokens stand beside parts of one.
            scale = np.maximum(np.abs(columns).max(axis=0), 1e-9)
            self._weights = np.linalg.lstsq(columns / scale, seconds, rcond=None)[0] / scale

    def predict_s(self, features: Features) -> float:
        """Returns the predicted seconds, at least 0.

        Raises:
            ValueError: there is no model yet.
        """
        if self._weights is None:
            raise ValueError(f"fewer than {LEAST_SAMPLES} samples")
        return max(0.0, float(self._weights @ np.array(features)))


class PredictedLatency(PrefixBalancer):
    """Draws an engine with weights that rise as the predicted time to first token falls."""

    def __init__(self, wire: Wire, targets: Sequence[Target], number: int, *, gateways: int, seed: int) -> None:
        super().__init__(wire, targets, number, gateways=gateways, seed=seed)
        self.model = LatencyModel()
        # Tokens sent and not answered, and tokens of answered requests that still hold their KV blocks.
        self._waiting = dict.fromkeys(self.targets, 0)
        self._resident = dict.fromkeys(self.targets, 0)
        self._sent: dict[SimRequest, tuple[Features, float, Target]] = {}
        self._answered: set[SimRequest] = set()

    def choose(self, request: SimRequest, candidates: Sequence[Target], now_s: float) -> Target:
        held = self.held_shares(request)
        if not self.model.is_known:
            scores = {target: self._composite(target, candidates, held.get(target, 0.0)) for target in candidates}
            best = max(scores.values())
            return self.random.choice([target for target, score in scores.items() if score == best])
        predicted = {
            target: self.model.predict_s(self._features(request, target, held.get(target, 0.0)))
            for target in candidates
        }
        warm = [target for target in candidates if held.get(target, 0.0) >= AFFINITY]
        if warm and min(predicted[target] for target in warm) <= min(predicted.values()) + PENALTY_S:
            predicted = {target: predicted[target] for target in warm}
        return self._draw(predicted)

    def _draw(self, predicted: dict[Target, float]) -> Target:
        best, worst = min(predicted.values()), max(predicted.values())
        if worst == best:
            return self.random.choice(list(predicted))
        weights = [(worst - seconds) / (worst - best) for seconds in predicted.values()]
        return self.random.choices(list(predicted), weights)[0]

    def _composite(self, target: Target, candidates: Sequence[Target], held: float) -> float:
        queues = [self.signals[each].waiting for each in candidates]
        longest, shortest = max(queues), min(queues)
        signal = self.signals[target]
        queue = (longest - signal.waiting) / (longest - shortest) if longest > shortest else 1.0
        return _QUEUE * queue + _KV * (1.0 - signal.kv_usage) + _PREFIX * held

    def _features(self, request: SimRequest, target: Target, held: float) -> Features:
        signal = self.signals[target]
        return (
            1.0,
            signal.kv_usage,
            request.prompt_tokens,
            request.prompt_tokens * (1.0 - held),
            signal.waiting,
            signal.running,
            held,
            self._waiting[target],
            self._resident[target],
        )

    def sent(self, request: SimRequest, target: Target, now_s: float) -> None:
        features = self._features(request, target, self.held_shares(request).get(target, 0.0))
        self._sent[request] = features, now_s, target
        self._waiting[target] += request.prompt_tokens
        super().sent(request, target, now_s)

    def answered(self, request: SimRequest, now_s: float) -> None:
        features, sent_s, target = self._sent[request]
        self.model.observe(features, now_s - sent_s)
        self._answered.add(request)
        self._waiting[target] -= request.prompt_tokens
        self._resident[target] += request.prompt_tokens

    def ended(self, request: SimRequest, target: Target, now_s: float) -> None:
        del self._sent[request]
        counted = self._waiting if request not in self._answered else self._resident
        counted[target] -= request.prompt_tokens
        self._answered.discard(request)
        super().ended(request, target, now_s)
