"""The line of a start, and lines of progress in a terminal and elsewhere."""

import io

import pytest
from moe_contract.quantities import describe_time
from moe_operator.cli.start import describe_start, join_phases
from moe_operator.progress import AGAIN_AFTER_S, ProgressLine, describe_share, estimate_left_s


def test_the_line_of_a_start_has_each_engine_once() -> None:
    phases = {"a-engine-0": "ready", "a-engine-1": "loading weights 1 of 3 files"}
    line, phase = describe_start("a", phases, 4.0)
    assert line == "a: 4 s: engine-0 ready, engine-1 loading weights 1 of 3 files"
    later = phases | {"a-engine-1": "loading weights 2 of 3 files"}
    assert describe_start("a", later, 5.0)[1] == phase, "numbers begin no phase"
    assert describe_start("a", dict.fromkeys(phases, "compiling"), 6.0)[0] == "a: 6 s: 2 engines: compiling"


def test_engines_at_the_same_point_are_named_together() -> None:
    assert join_phases("a", {"a-engine-0": "x"}) == "engine-0 x"
    assert join_phases("a", {"a-engine-0": "x", "a-engine-1": "y"}) == "engine-0 x, engine-1 y"


def test_in_a_terminal_one_line_is_rewritten_within_its_width() -> None:
    output = io.StringIO()
    line = ProgressLine(output, columns=10)
    line.show("0123456789abc")
    line.show("second")
    line.close()
    line.close()
    assert output.getvalue() == "\r\x1b[2K012345678\r\x1b[2Ksecond\r\x1b[2K"


def test_elsewhere_a_phase_is_a_line_that_is_repeated_after_a_while() -> None:
    output, now_s = io.StringIO(), [0.0]
    line = ProgressLine(output, columns=None, clock=lambda: now_s[0])
    for at_s, text in ((0.0, "load 1"), (1.0, "load 2"), (AGAIN_AFTER_S, "load 3"), (AGAIN_AFTER_S + 1, "end")):
        now_s[0] = at_s
        line.show(text, phase=text[:4])
    line.close()
    assert output.getvalue().splitlines() == ["load 1", "load 3", "end"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min 0 s"), (3599, "59 min 59 s"), (7500, "2 h 5 min")]
)
def test_a_time_has_two_units_at_most(seconds: float, text: str) -> None:
    assert describe_time(seconds) == text


def test_the_time_left_is_that_of_the_pace_so_far() -> None:
    assert estimate_left_s(0, 8, 10.0) is None
    assert estimate_left_s(9, 8, 10.0) == 0.0
    assert describe_share(0, 8, 5.0) == "0 of 8"
    assert describe_share(2, 8, 20.0) == "2 of 8, about 1 min 0 s left"
