"""The commands of the pages: each is checked against the program that it names, or says why not.

A block with something that no test can check has `<!-- not checked: REASON -->` before it. Commands of `moeserving`
that only read files are run; all others are parsed by the real parser.
"""

import re
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from documented_commands import Block, is_yaml, read_blocks, read_inline, split_block
from moe_contract.serving_routes import Route
from moe_operator.cli.command import app
from moe_operator.cli.rooms import OWN, ROOMS, load_command
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "charts/moeserving/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# The roadmap names commands that do not exist yet.
PRESENT = [page for page in PAGES if page.name != "roadmap.md"]
BLOCKS = [block for page in PAGES for block in read_blocks(page, ROOT)]
COMMANDS = [block for block in BLOCKS if block.is_shell and not block.reason]
TARGETS = frozenset(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
VALUES = yaml.safe_load((ROOT / "charts/moeserving/values.yaml").read_text("utf-8"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
NAMES_OF_THE_KIND = frozenset(("moes", "moeserving", "moeservings"))
# Of other programs the commands are known by name, and what they name of ours is checked.
KUBECTL = frozenset(
    (
        "annotate", "apply", "create", "delete", "describe", "get", "krew", "label", "logs", "patch", "plugin",
        "port-forward", "wait",
    )
)  # fmt: skip
HELM = frozenset(("install", "upgrade", "uninstall"))
# Commands that read files and print, and need nothing else.
READING = frozenset(("validate", "crd", "plan"))


def check_moeserving(words: list[str]) -> str | None:
    """The fault that the command's own parser finds, or that of a file that it names and the tree lacks."""
    if words in (["--version"], ["--help"]):
        return None
    if not words or words[0] not in {*OWN, *ROOMS}:
        return f"no such command: {words[:1]}"
    words = [word.strip("[]") for word in words]
    command, rest, name = load_command(words[0]), words[1:], words[0]
    try:
        while getattr(command, "commands", None):
            name, rest = rest[0], rest[1:]
            command = command.commands[name]
        command.make_context(name, rest)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    files = [word for word in rest if re.match(r"(manifests|bench|charts|crds|docs)/", word)]
    return next((f"no file {path}" for path in files if not (ROOT / path).exists()), None)


def check_make(words: list[str]) -> str | None:
    named = [word for word in words if "=" not in word]
    return next((f"no target {word}" for word in named if word not in TARGETS), None)


def check_kubectl(words: list[str]) -> str | None:
    if words[0] == "moeserving":
        return check_moeserving(words[1:])
    if words[0] not in KUBECTL:
        return f"kubectl {words[0]} is not known here"
    kinds = {word.split("/")[0] for word in words[1:] if re.match(r"moes[a-z]*(/|$)", word)}
    if kinds - NAMES_OF_THE_KIND:
        return f"no kind of ours: {kinds}"
    files = [words[at + 1] for at, word in enumerate(words) if word == "-f"]
    ours = [path for path in files if path.startswith(("manifests/", "crds/"))]
    return next((f"no file {path}" for path in ours if not (ROOT / path).exists()), None)


def check_helm(words: list[str]) -> str | None:
    if words[0] not in HELM:
        return f"helm {words[0]} is not known here"
    if words[0] != "uninstall" and "charts/moeserving" not in words:
        return "another chart"
    for setting in (words[at + 1] for at, word in enumerate(words) if word == "--set"):
        place = VALUES
        for key in setting.partition("=")[0].split("."):
            if key not in place:
                return f"the chart has no value {setting}"
            place = place[key]
    return None


def check_python(words: list[str]) -> str | None:
    """Whether a module can be run, and its sources have the options that it is given."""
    if words[:1] != ["-m"] or not words[1].startswith("moe_"):
        return None
    found = find_spec(words[1])
    if found is None or found.origin is None:
        return f"no module {words[1]}"
    folder = Path(found.origin).parent
    sources = "".join(path.read_text("utf-8") for path in folder.rglob("*.py"))
    options = {word.partition("=")[0].strip("[]") for word in words if word.strip("[").startswith("--")}
    return next((f"no option {option}" for option in options if not declares(sources, option)), None)


def declares(sources: str, option: str) -> bool:
    """Whether the sources have an option by its name or by that of a parameter."""
    parameter = option.removeprefix("--no-").removeprefix("--").replace("-", "_")
    return f'"{option}"' in sources or re.search(rf"^    {parameter}: ", sources, re.MULTILINE) is not None


def check_pip(words: list[str]) -> str | None:
    extras = {extra for word in words for text in re.findall(r"moeserving\[(.*)\]", word) for extra in text.split(",")}
    unknown = extras - PROJECT["optional-dependencies"].keys()
    return f"no extra {unknown}" if unknown else None


def check_curl(words: list[str]) -> str | None:
    paths = [urlsplit(word).path for word in words if word.startswith("http")]
    return next((f"no route {path}" for path in paths if path not in ROUTES), None)


ROUTES = frozenset(route.value[0] for route in Route)
CHECKS = {
    "moeserving": check_moeserving,
    "make": check_make,
    "kubectl": check_kubectl,
    "helm": check_helm,
    "python": check_python,
    "pip": check_pip,
    "curl": check_curl,
}


def check_command(words: list[str]) -> str | None:
    """The fault of a simple command, None where there is none."""
    program = words[0].removeprefix(".venv/bin/")
    if program not in CHECKS:
        return f"{program} is not known here: mark the block"
    return CHECKS[program](words[1:])


def name_block(block: Block) -> str:
    return block.place


@pytest.mark.parametrize("block", COMMANDS, ids=name_block)
def test_each_command_is_one_that_its_program_takes(block: Block) -> None:
    faults = [f"{' '.join(words)}: {fault}" for words in split_block(block.text) if (fault := check_command(words))]
    assert faults == []


def test_a_block_has_commands_or_yaml_or_says_its_language() -> None:
    """A block without a language is read by its first word; one that is neither has the language `text`."""
    assert [block.place for block in BLOCKS if not (block.is_shell or block.language or is_yaml(block.text))] == []


def test_few_blocks_are_not_checked() -> None:
    unchecked = {block.place: block.reason for block in BLOCKS if block.is_shell and block.reason}
    assert len(unchecked) <= len(COMMANDS) / 10, unchecked


def reading_commands() -> Iterator[list[str]]:
    for block in COMMANDS:
        for words in split_block(block.text):
            if words[0].endswith("moeserving") and words[1] in READING and "--advise" not in words:
                yield words[1:]


@pytest.mark.parametrize("words", list(reading_commands()), ids=" ".join)
def test_commands_that_only_read_run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert CliRunner().invoke(app, words).exit_code == 0


def options_of(command: object) -> set[str]:
    """All options of a command and of its subcommands."""
    found = {name for parameter in getattr(command, "params", ()) for name in (*parameter.opts, "-h", "--help")}
    for child in getattr(command, "commands", {}).values():
        found |= options_of(child)
    return found


@pytest.mark.parametrize("page", PRESENT, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_within_sentences_exist(page: Path) -> None:
    """Their options are those of the command; placeholders and alternatives stand for arguments."""
    faults = []
    for text in read_inline(page):
        words = re.split(r"[\s\[\]|]+", text.removeprefix("kubectl ").replace(".venv/bin/", "").strip())
        if words[:1] == ["make"] and len(words) > 1 and check_make(words[1:2]):
            faults.append(text)
        elif words[:1] == ["moeserving"] and len(words) > 1 and words[1].isalpha():
            if words[1] not in {*OWN, *ROOMS}:
                faults.append(text)
            else:
                named = {word.partition("=")[0] for word in words[2:] if word.startswith("-") and len(word) > 1}
                faults += [f"{text}: {option}" for option in named - options_of(load_command(words[1]))]
    assert faults == []
