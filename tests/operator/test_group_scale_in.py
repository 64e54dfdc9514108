"""Scale-in of groups: what drains, what is waited for, and what becomes of it when more are wanted meanwhile."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_operator.kubernetes.group_scale_in import begun_goal, plan_scale_in

NAME = "tiny-engine"
READY, DRAINING, STOPPED, STARTING = "ready", "draining", "stopped", "starting"


@pytest.mark.parametrize(
    ("wanted", "present", "begun", "phases", "found"),
    [
        (3, 3, None, [READY] * 3, None),
        (4, 3, None, [READY] * 3, None),
        # Asked, then waited for, then gone; as far as the highest that still works.
        (1, 3, None, [READY] * 3, (1, 3, (1, 2))),
        (1, 3, 1, [READY, DRAINING, DRAINING], (1, 3, ())),
        (1, 3, 1, [READY, DRAINING, STOPPED], (1, 2, ())),
        (1, 3, 1, [READY, STOPPED, DRAINING], (1, 3, ())),
        (1, 3, 1, [READY, STOPPED, STOPPED], (1, 1, ())),
        # One that starts or waits for its next start has nothing to lose, and is asked all the same.
        (1, 3, None, [READY, STARTING, "backoff"], (1, 3, (1, 2))),
        # One that does not answer is not waited for.
        (1, 3, None, [READY, None, None], (1, 1, ())),
        (1, 3, None, [READY, READY, None], (1, 2, (1,))),
        (0, 1, None, [READY], (0, 1, (0,))),
        # The set is smaller, but its controller has not ended the pods yet.
        (1, 1, 1, [READY, STOPPED, STOPPED], (1, 1, ())),
        (1, 1, 1, [READY], None),
        # More are wanted again: those that were drained go all the same, and then come anew.
        (3, 3, 1, [READY, DRAINING, STOPPED], (1, 2, ())),
        (3, 3, 1, [READY, READY, STOPPED], (2, 2, ())),
        (3, 1, 1, [READY, STOPPED, STOPPED], (1, 1, ())),
        (3, 1, 1, [READY], None),
        (5, 3, 1, [READY, READY, READY], None),
        # Fewer still.
        (1, 3, 2, [READY, READY, DRAINING], (1, 3, (1,))),
        # Drained by somebody else while no scale-in goes on.
        (3, 3, None, [STOPPED, READY, READY], None),
        (2, 3, None, [STOPPED, READY, READY], (2, 3, (2,))),
    ],
)
def test_what_goes_on(
    wanted: int,
    present: int,
    begun: int | None,
    phases: list[str | None],
    found: tuple[int, int, tuple[int, ...]] | None,
) -> None:
    scale_in = plan_scale_in(NAME, wanted, present, begun, dict(enumerate(phases)))
    assert (scale_in and (scale_in.goal, scale_in.replicas, scale_in.ask)) == found


def test_the_text_counts_the_groups_that_are_waited_for() -> None:
    some = plan_scale_in(NAME, 1, 3, 1, {0: READY, 1: DRAINING, 2: STOPPED})
    assert some is not None
    assert some.text == "tiny-engine: 1 of the 2 groups that go still end their streams"


@pytest.mark.parametrize(
    ("live", "goal"),
    [
        (None, None),
        ({"metadata": {}}, None),
        ({"metadata": {"annotations": {"moeserving.dev/scale-in": "2"}}}, 2),
        ({"metadata": {"annotations": {"moeserving.dev/scale-in": "two"}}}, None),
    ],
)
def test_what_was_begun_stands_in_an_annotation(live: dict[str, object] | None, goal: int | None) -> None:
    assert begun_goal(live) == goal


@given(
    st.lists(st.sampled_from([READY, DRAINING, STOPPED, STARTING, None]), min_size=1, max_size=6),
    st.lists(st.integers(0, 7), min_size=1, max_size=5),
    st.randoms(use_true_random=False),
)
def test_it_comes_to_the_wanted_number_without_an_engine_that_ends_while_it_has_streams(first, wishes, chance) -> None:
    """A world of one set: agents drain when they are asked, the controller ends the highest and makes new ones."""
    phases: dict[int, str | None] = dict(enumerate(first))
    present, begun = len(first), None
    by_others = {index for index, phase in phases.items() if phase in (DRAINING, STOPPED)}
    for wanted in [*wishes, *[wishes[-1]] * 60]:
        scale_in = plan_scale_in(NAME, wanted, present, begun, phases)
        while scale_in is not None and scale_in.ask:
            for index in scale_in.ask:
                phases[index] = DRAINING
            scale_in = plan_scale_in(NAME, wanted, present, scale_in.goal, phases)
        if scale_in is None:
            assert wanted >= present
            present, begun = wanted, None
        else:
            assert scale_in.goal <= scale_in.replicas <= present
            present, begun = scale_in.replicas, scale_in.goal
        if chance.random() < 0.7:
            for index in [index for index in phases if index >= present]:
                assert phases[index] in (STOPPED, None), "it still has streams"
                del phases[index]
            phases |= {index: READY for index in range(present) if index not in phases}
        for index, phase in phases.items():
            if phase == DRAINING and chance.random() < 0.5:
                phases[index] = STOPPED
    assert present == wishes[-1]
    assert all(phase not in (DRAINING, STOPPED) for index, phase in phases.items() if index not in by_others)
