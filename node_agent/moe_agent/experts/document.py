"""`experts.json`: what the first rank of an expert group tells people, made from its controller.

Made within a step, so it copies arrays and formats nothing; the text is made aside, row by row, because one call of
`json.dumps` over the load of a large model would hold up the engine's own thread for a quarter of a second.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from moe_agent.experts.controller import Controller
from moe_agent.experts.decision_log import Decision
from moe_agent.experts.window import Floats

HOTTEST = 10
# Digits that matter in a figure; more make the file larger and say nothing.
_DIGITS = 6

Document = dict[str, Any]


def build_document(controller: Controller, now_s: float) -> Document:
    """The document as of `now_s` (monotonic); arrays are copies."""
    tokens = controller.window.tokens_a_step().copy()
    shape, balance = controller.shape, controller.balance
    return {
        "written_s": now_s,
        "mode": controller.settings.mode.value,
        **asdict(shape),
        "step": controller.step,
        "placement": {
            "version": controller.version,
            "directive": controller.inbox.settled,
            "physical_to_logical": controller.placement.copy(),
        },
        "load": {"steps": controller.window.steps, "tokens": tokens, "hottest": list_hottest(tokens)},
        "balance": {
            "mean": balance.mean,
            "worst": balance.worst,
            "by_layer": balance.by_layer,
            "by_rank": balance.by_rank,
        },
        "remote_fraction": balance.remote_fraction,
        "costs": asdict(controller.costs),
        "decisions": [_decision(row, now_s) for row in controller.log.rows],
        "totals": {
            "moves": controller.log.totals.moves,
            "decisions": dict(controller.log.totals.decisions),
            "stayed": dict(controller.log.totals.stayed),
            "lost_s": controller.log.totals.lost_s,
            "won_s": controller.log.totals.won_s,
        },
        "problems": [{"kind": kind.value, "message": message} for kind, message in controller.problems()],
    }


def list_hottest(tokens: Floats) -> list[Document]:
    """The experts with the most tokens a step over all sources, the hottest first; those without any are left out."""
    total = tokens.sum(axis=0)
    order = np.argsort(-total, axis=None, kind="stable")[:HOTTEST]
    places = zip(*np.unravel_index(order, total.shape), strict=True)
    rows = [{"layer": int(at), "expert": int(of), "tokens": float(total[at, of])} for at, of in places]
    return [row for row in rows if row["tokens"] > 0.0]


def _decision(row: Decision, now_s: float) -> Document:
    shown: Document = {
        "number": row.number,
        "step": row.step,
        "age_s": now_s - row.made_s,
        "outcome": row.outcome.value,
        "reason": row.reason,
        "moves": row.moves,
        "predicted_gain_s": row.predicted_gain_s,
        "measured_gain_s": row.measured_gain_s,
        "cost_s": row.cost_s,
        "balance_before": row.balance_before,
        "balance_after": row.balance_after,
        "seconds": row.seconds,
    }
    return shown if row.placement is None else shown | {"physical_to_logical": row.placement}


def render_document(document: Document) -> bytes:
    """As JSON."""
    return "".join(_parts(document)).encode()


def _parts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from _joined("{", (_prefixed(f"{json.dumps(key)}: ", inner) for key, inner in value.items()), "}")
    elif isinstance(value, list) or (isinstance(value, np.ndarray) and value.ndim > 1):
        yield from _joined("[", (_parts(inner) for inner in value), "]")
    elif isinstance(value, np.ndarray):
        yield json.dumps(np.round(value, _DIGITS).tolist())
    else:
        yield json.dumps(value)


def _prefixed(prefix: str, value: Any) -> Iterator[str]:
    yield prefix
    yield from _parts(value)


def _joined(opened: str, rows: Iterator[Iterator[str]], closed: str) -> Iterator[str]:
    yield opened
    for number, row in enumerate(rows):
        if number:
            yield ", "
        yield from row
    yield closed
