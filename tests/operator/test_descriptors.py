"""How many streams of states fit into the operator's process."""

import resource

import pytest
from moe_operator.kubernetes.descriptors import RESERVED, most_streams


@pytest.mark.parametrize(
    ("limits", "streams"),
    [
        ((1024, 4096), 4096 - RESERVED),
        ((4096, 4096), 4096 - RESERVED),
        ((100, 100), 0),
        ((1024, resource.RLIM_INFINITY), 1_000_000),
    ],
)
def test_the_soft_limit_is_raised_and_some_descriptors_are_left(
    limits: tuple[int, int], streams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_force = [limits]
    monkeypatch.setattr(resource, "getrlimit", lambda _: in_force[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, wanted: in_force.append(wanted))
    assert most_streams() == streams
    assert in_force[-1][0] == limits[1]
