"""What the operator cannot read of the cluster, by kind and namespace, and which resources that concerns.

Kept by `watches.py`. A resource is left as it is while a kind of its objects is not known: what is not seen might be
running.
"""

from collections.abc import Iterable

from moe_contract.api_server import FORBIDDEN, ApiError, Kind

from moe_operator.kubernetes.kinds import SERVING

Place = tuple[Kind, str | None]
_TERSE = 300


class Sight:
    """The kinds in namespaces (None: all) that should be followed, and why some are not.

    Args:
        places: all of them; none was read yet.

    Attributes:
        awaited: those that were neither read nor refused yet.
    """

    def __init__(self, places: Iterable[Place]) -> None:
        self.awaited: set[Place] = {*places}
        # Not known: never read, or refused since.
        self._unknown: set[Place] = set(self.awaited)
        self._reasons: dict[Place, str] = {}

    def seen(self, kind: Kind, namespace: str | None) -> bool:
        """Notes that a kind was read, or that the cluster lacks it; returns whether it was not known before."""
        place = (kind, namespace)
        self.awaited.discard(place)
        self._reasons.pop(place, None)
        was_unknown = place in self._unknown
        self._unknown.discard(place)
        return was_unknown

    def failed(self, kind: Kind, namespace: str | None, error: ApiError) -> bool:
        """Notes that a kind could not be read; returns whether that changes what is known.

        A lack of rights lasts until a person gives them. Any other failure passes: what was read before stays known.
        """
        place, refused = (kind, namespace), error.status == FORBIDDEN
        if refused:
            self.awaited.discard(place)
        if not refused and place not in self._unknown:
            return False
        self._unknown.add(place)
        self._reasons[place] = f"{place_text(kind, namespace)}: {error.message[:_TERSE]}"
        return True

    def blind_spot(self, namespace: str) -> str:
        """Why resources of a namespace cannot be served; empty when all that is needed is known.

        Of kinds that a cluster may lack nothing is needed, and a resource that is known was read.
        """
        spots = [
            place
            for place in self._unknown
            if place[1] in (None, namespace) and not place[0].optional and place[0] != SERVING
        ]
        if not spots:
            return ""
        texts = sorted(self._reasons.get(place) or f"{place_text(*place)}: not read yet" for place in spots)
        return texts[0] + (f"; and {len(texts) - 1} kinds more" if len(texts) > 1 else "")

    def unreadable(self) -> list[tuple[str, str]]:
        """Kind and namespace (empty: all) of what was refused or fails, sorted."""
        return sorted((kind.plural, namespace or "") for kind, namespace in self._reasons)


def place_text(kind: Kind, namespace: str | None) -> str:
    """A kind in a namespace in words."""
    return f"{kind.plural} in {namespace}" if namespace else f"{kind.plural} in all namespaces"
