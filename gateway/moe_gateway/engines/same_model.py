"""Which engines compute the tokens of a stream as its first engine did: they serve the same model. Pure.

The name that a client asks for does not say it: a canary, or the new engines of a rollout, serve other weights under
the same name.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import Any, NamedTuple, TypeVar

from moe_gateway.engines.fleet import Engine

Name = TypeVar("Name")


class ModelIdentity(NamedTuple):
    """What an engine serves under one name.

    Attributes:
        engine: the identity that its agent reports; empty for a server without an agent.
        root: where the weights come from, as the engine lists it; None for the own model of an engine with an agent.
        max_model_len: longest sequence in tokens, of a server without an agent.
    """

    engine: str
    root: str | None
    max_model_len: int | None = None


def identify_model(engine: Engine | None, model: str | None) -> ModelIdentity | None:
    """What an engine serves under a name, without one under its first; None where it is not known.

    An agent reports the identity of its engine. Of a server without an agent the root and the longest sequence have to
    do.
    """
    if engine is None:
        return None
    rows = engine.model_rows
    row = rows.get(model) if model is not None else next(iter(rows.values()), None)
    if row is None:
        return None
    root = row.get("root")
    if engine.address.agent_url is not None:
        # An adapter has a root of its own. The engine's other names are known before it has listed their rows.
        return ModelIdentity(engine.identity, str(root) if row.get("parent") else None) if engine.identity else None
    length = find_length(engine)
    return None if type(root) is not str or length is None else ModelIdentity("", root, length)


class SameModel(Set[str]):
    """The names of the engines that serve the same model under a name, at any time: engines come and go."""

    def __init__(self, engines: Callable[[], Mapping[str, Engine]], identity: ModelIdentity, model: str | None) -> None:
        self._engines, self._identity, self._model = engines, identity, model

    @classmethod
    def _from_iterable(cls, it: Iterable[Name]) -> Set[Name]:
        # The intersection with other names is a plain set.
        return frozenset(it)

    def __contains__(self, name: object) -> bool:
        engine = self._engines().get(name) if isinstance(name, str) else None
        return identify_model(engine, self._model) == self._identity

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._engines() if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @property
    def max_model_len(self) -> int | None:
        """The longest sequence in tokens that each of them takes; None where none has said it."""
        engines = self._engines()
        return min((length for name in self if (length := find_length(engines[name])) is not None), default=None)


def find_length(engine: Engine) -> int | None:
    """The longest sequence of an engine in tokens, which its adapters do not list; None where it is not known."""
    lengths: Iterable[Any] = (row.get("max_model_len") for row in engine.model_rows.values())
    return next((length for length in lengths if type(length) is int), None)
