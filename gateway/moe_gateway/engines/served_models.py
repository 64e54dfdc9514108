"""Which names of models the engines serve: of the base model, its aliases and LoRA adapters. Pure.

Most fleets serve the same names everywhere. A name that only some engines serve, such as an adapter that was loaded at
run time, goes to those alone. An engine whose names are not known yet may serve any.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from moe_gateway.engines.fleet import Engine


def find_partial(engines: Collection[Engine]) -> dict[str, frozenset[str]]:
    """Returns, for each name that some engines do not serve, the names of the engines that may serve it."""
    models = {model for engine in engines for model in engine.models}
    partial = {}
    for model in models:
        servers = frozenset(engine.address.name for engine in engines if _may_serve(engine, model))
        if len(servers) < len(engines):
            partial[model] = servers
    return partial


def _may_serve(engine: Engine, model: str) -> bool:
    return not engine.models or not engine.has_listed or model in engine.models


def model_row(name: str) -> dict[str, Any]:
    """The row of a model of which nothing but its name is known."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "moeserving"}


def find_model(name: str, engines: Iterable[Engine], known: Collection[str]) -> Mapping[str, Any] | None:
    """The row of a model as the first engine that serves it lists it; None for a name that is not among the known."""
    rows = (engine.model_rows[name] for engine in engines if name in engine.model_rows)
    return next(rows, model_row(name) if name in known else None)


def may_be_unloaded(name: str | None, engines: Collection[Engine]) -> bool:
    """Whether an engine may have unloaded a model since it listed it, as it may a LoRA adapter."""
    if name is None:
        return False
    row = find_model(name, engines, ())
    return row is not None and (bool(row.get("parent")) or name in find_partial(engines))


def list_models(engines: Collection[Engine]) -> dict[str, Any]:
    """The union of what engines list, as a document of `/v1/models`: each name once, in the order of the engines."""
    rows: dict[str, Mapping[str, Any]] = {}
    for engine in engines:
        for name in sorted(engine.models):
            rows.setdefault(name, engine.model_rows.get(name) or model_row(name))
    return {"object": "list", "data": list(rows.values())}
