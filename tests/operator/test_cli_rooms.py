"""One command of several rooms: what is loaded when, and what a missing part leaves standing."""

import os
import re
import subprocess
import sys
from importlib.metadata import EntryPoint, entry_points

import pytest
import typer
from moe_operator.cli import rooms
from moe_operator.cli.command import app
from typer.testing import CliRunner


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output


def registered(entry: EntryPoint) -> set[str]:
    """The commands that an entry has for users; one that another command runs is hidden."""
    commands = getattr(typer.main.get_command(entry.load()), "commands", {})
    return {name for name, command in commands.items() if not command.hidden} or {entry.name}


def test_every_command_that_another_room_registers_is_listed_and_no_other() -> None:
    for entry in entry_points(group=rooms.GROUP):
        listed = {name for name, room in rooms.ROOMS.items() if room.entry == entry.name}
        assert listed == registered(entry), entry.name


@pytest.mark.parametrize("name", [*rooms.OWN, *rooms.ROOMS])
def test_a_command_of_any_room_runs_as_if_it_were_here(name: str) -> None:
    code, said = invoke(name, "--help")
    assert (code, f"moeserving {name}" in said or f"root {name}" in said) == (0, True), said


def test_the_help_page_loads_no_other_room_and_no_engine() -> None:
    script = (
        "import sys\nfrom moe_operator.cli.command import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "heavy = {'moe_tools', 'moe_lab', 'aiohttp', 'pydantic', 'torch', 'vllm', 'uvloop'}\n"
        "sys.exit(' '.join(loaded & heavy) or None)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert all(f"\n  {name} " in result.stdout for name in (*rooms.OWN, *rooms.ROOMS))


@pytest.mark.parametrize("group", [(), ("experts",), ("model",)])
def test_no_summary_of_a_command_is_cut_in_a_terminal_of_80_columns(group: tuple[str, ...]) -> None:
    command, environment = [sys.executable, "-m", "moe_operator.cli", *group, "--help"], {**os.environ, "COLUMNS": "80"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert [row for row in done.stdout.splitlines()[1:] if row.endswith("...")] == []


def test_the_question_why_a_request_waited_is_found_in_the_list_of_commands() -> None:
    code, said = invoke("--help")
    assert code == 0
    assert re.search(r"^ +explain +.*waited", said, re.MULTILINE), said


def test_a_part_that_is_not_installed_names_its_extra_and_leaves_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = EntryPoint(name="bench", group=rooms.GROUP, value="absent_package.cli:app")
    monkeypatch.setattr(rooms, "entry_points", lambda group: [broken])
    assert invoke("replay") == (
        1, "moeserving replay: the package absent_package is missing: pip install 'moeserving[bench]'\n",
    )  # fmt: skip
    assert invoke("agent") == (1, "moeserving agent: a part is missing: pip install 'moeserving[agent]'\n")
    assert invoke("crd")[0] == 0


def test_a_missing_package_of_the_operator_names_its_extra_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "moe_operator.cli.running", None)
    code, said = invoke("status")
    assert (code, said) == (
        1, "moeserving status: the package moe_operator.cli.running is missing: pip install 'moeserving[operator]'\n",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "instead"),
    [
        (("status", "tiny", "-n", "models"), "kubectl describe moes NAME"),
        (("status", "tiny", "--context", "c"), "kubectl describe moes NAME"),
        (("set", "tiny", "a=b", "--namespace", "models"), "kubectl patch moes NAME"),
        (("down", "tiny", "-n", "models"), "kubectl delete moes NAME"),
        (("up", "-f", "x.yaml", "-n", "models"), "kubectl apply -f FILE"),
        (("logs", "tiny", "--namespace", "models"), "kubectl logs POD"),
    ],
    ids=lambda part: part[0] if isinstance(part, tuple) else "",
)
def test_a_command_for_one_machine_names_that_for_a_cluster(words: tuple[str, ...], instead: str) -> None:
    code, said = invoke(*words)
    assert code == 2
    assert said.startswith(f"moeserving {words[0]} is for this machine; in a cluster: `{instead}")


def test_another_unknown_option_is_named() -> None:
    code, said = invoke("status", "--nonsense")
    assert (code, "No such option: --nonsense" in said) == (2, True)


def test_an_unknown_command_is_a_usage_error() -> None:
    code, said = invoke("upp")
    assert code == 2
    assert "No such command 'upp'" in said


COMMAND = [sys.executable, "-m", "moe_operator.cli"]


@pytest.mark.parametrize("words", [["crd"], ["--help"], ["doctor", "--local", "-o", "json"]])
def test_an_output_that_a_shell_has_closed_is_no_error(words: list[str]) -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *COMMAND, *words], capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no full device")
@pytest.mark.parametrize("words", [["crd"], ["--help"]])
def test_an_output_that_is_full_is_one_line(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, *words], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "moeserving: the output cannot be written: no space left on device\n"


def test_an_unknown_command_is_named_with_the_nearest_and_all_known() -> None:
    code, said = invoke("stauts")
    assert code == 2
    assert "No such command 'stauts'. Did you mean status? Known: up, down, status" in said
