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


@pytest.mark.parametrize("error", [ValueError("not allowed to raise maximum limit"), PermissionError(1, "refused")])
@pytest.mark.parametrize("hard", [4096, resource.RLIM_INFINITY])
def test_a_limit_that_cannot_be_raised_stays_and_is_counted_with(
    error: Exception, hard: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_limit: int, _wanted: tuple[int, int]) -> None:
        raise error

    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, hard))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert most_streams() == 1024 - RESERVED
