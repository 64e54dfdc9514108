"""Pictures of terminal output: the text is in them, the network and this machine are not."""

import subprocess
import sys

import pytest
from moe_lab.terminal_picture import render_svg, run_in_colour

COLOURED = "\x1b[1mNAME\x1b[0m  \x1b[32mready\x1b[0m\n"


def test_a_picture_has_the_text_its_colours_and_its_title():
    svg = render_svg(COLOURED, "moeserving status", 60)
    assert svg.startswith("<svg")
    for part in ("NAME", "ready", "moeserving&#160;status"):
        assert part in svg
    assert svg == render_svg(COLOURED, "moeserving status", 60)


def test_a_picture_names_nothing_in_the_network():
    svg = render_svg(COLOURED, "t", 60)
    assert "font-face" not in svg
    assert [part for part in svg.split() if "http" in part and "www.w3.org" not in part] == []


def test_the_command_runs_as_in_a_terminal_of_this_width():
    script = "from rich.console import Console; c = Console(); c.print('[red]x[/red]', c.width)"
    out = run_in_colour([sys.executable, "-c", script], 77)
    assert "\x1b[31m" in out
    assert "77" in out


def test_a_command_that_fails_leaves_no_picture():
    with pytest.raises(subprocess.CalledProcessError):
        run_in_colour([sys.executable, "-c", "raise SystemExit(3)"], 77)
