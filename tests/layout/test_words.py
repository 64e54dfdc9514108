"""Words and sizes: private names of earlier versions stay out of the tree, files and functions stay small.

Exempt are this file, the changelog, `docs/results/` (generated from earlier runs) and superseded decisions, which stay
as they were written. What to say instead: docs/glossary.md.
"""

import ast
import re
import subprocess
from collections import defaultdict
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOST_LINES = 500
MOST_FUNCTION_LINES = 50
LEAST_WORDS = 5
# Names of classes, functions, fields and files, as whole words of Python sources.
NAMES = (
    "Bell", "BellRope", "hush", "Ticks", "Announcements", "Feed", "Told", "TargetBooks", "Ledger", "Bid", "Roster",
    "PeerLoad", "own_share", r"Shares\(", "Corrections", "slowness", "Pace", "common_line", "Bend", "Curve",
    "LateStart", "late_s", "schedule_late", "Board", "fees", "Account", "in_the_red", "lived_s", "Spell", "Spells",
    "plan_retreat", "kept_by", "Beat", "keep_beat", "FirstRank", "first_rank", "Surroundings", "Placed", "lesson",
    "wants_lesson", "seats", "hurry", "foreign_replicas", "Problem", "problems_of", "complaints", "Narrator", "Bed",
    "Stage", "Scene", "bury", "books", "lanes", "lane", "inbox", "RankPageReader", "RankPageWriter",
    "ControlPageWriter", "ControlPageReader", "floor_s", "offset_s", "band", "keep_account", "_mind", "trust", "excess",
)  # fmt: skip
# Words that no name of the code has as one of its parts: `is_told`, `told_s` and `ToldLines` are found by "told".
PARTS = frozenset(
    (
        "announcements", "beat", "bed", "bell", "bend", "bid", "board", "books", "bury", "complaints", "fees", "heard",
        "hurry", "hush", "inbox", "lane", "lanes", "ledger", "lesson", "mind", "nameless", "narrator", "promise",
        "promises", "race", "rings", "rope", "roster", "rung", "scene", "seats", "slowness", "spells", "surroundings",
        "told", "who",
    )
)  # fmt: skip
# Prose of sources and pages, without regard to case.
PHRASES = (
    r"(the|a|its|one|each) bell",
    r"rings? (the|its|for|a|when|wakes)",
    r"(own|the|its|their|gateway's|our) books",
    r"per-tenant lanes?|(the|a|its|each) lanes?",
    r"(the|a|its|control|rank's|memory-mapped) pages? (of|in) (the )?(engine|shared memory|rank)",
    r"control page",
    r"in the red",
    r"(one|the|a|each) beat",
    r"ledger",
    r"so many(?! as)",
    r"so manieth",
    r"told",
    r"(who|whoever) (comes|asks|calls|checks|needs|has|serves|reads|stands)",
    r"bells?|ropes?|hush(es|ed)?|rung|rang|books|rosters?|surroundings|inbox",
    r"per-tenant races?|race of (lanes|tenants)",
    r"nameless (one|tenant)('s)?",
    r"believ(es|ed)",
    r"what is seen",
    r"(take|takes|taken|took) back",
    r"See the module",
)
# Phrases for which English has a noun: "the present problems", not "what is wrong".
PRONOUNS = (r"what (is|are|was|were)", r"of it", r"what (comes?|came|becomes?|became) of")
# Text of a prompt and of an answer.
QUOTED = ('"What is {}?"', '"all of it"')
# Rooms whose sources are read for these phrases, and all pages but the generated ones.
ROOMS = ("bench/", "contract/", "gateway/", "kernels/", "node_agent/", "scheduling/", "charts/", "README.md", "docs/")
# Names that several classes have because they are one idea, and what it is.
SHARED_CLASS_NAMES = {
    "Discovery": "finding engines by their Services: the gateway's setting, and what carries it out",
    "Engine": "a vLLM server that takes requests: the resource's section, and the gateway's state of one",
    "Gateway": "the way in for clients: the resource's section, and the program",
    "Metrics": "what is scraped of the operator and its engines: the resource's section, and the operator's registry",
    "ScalingPolicy": "the most that may change in a period: the resource's section, and the rule for the decision",
    "Scheduling": "settings of the layers: the resource's section, and the same field names in a scenario",
    "Section": "base of the sections of a file, frozen and strict: of the resource, and of configuration files",
    "_PlainDumper": "YAML without aliases: of the CRD, and of a plan; neither module imports the other",
}
MODULE = re.compile(r"See the (module|class|protocol)\b")


@cache
def tracked() -> tuple[Path, ...]:
    """Text files that git tracks or would track."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    return tuple(path for path in paths if path.is_file() and path.suffix in {".py", ".md", ".yaml", ".sh"})


def is_exempt(path: Path) -> bool:
    """Whether history keeps earlier words here."""
    if path == Path(__file__) or path.name == "CHANGELOG.md" or ROOT / "docs" / "results" in path.parents:
        return True
    is_decision = path.parent == ROOT / "docs" / "adr"
    return is_decision and (path.name == "README.md" or "Status: superseded" in path.read_text("utf-8"))


@cache
def read(suffixes: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Path and text of the files with these suffixes that are not exempt."""
    paths = [path for path in tracked() if path.suffix in suffixes and not is_exempt(path)]
    return tuple((str(path.relative_to(ROOT)), path.read_text("utf-8")) for path in paths)


@cache
def modules() -> tuple[tuple[str, ast.Module], ...]:
    """Path and syntax tree of the Python files that are not exempt."""
    return tuple((path, ast.parse(text)) for path, text in read((".py",)))


def find(patterns: tuple[str, ...], suffixes: tuple[str, ...], flags: int = 0) -> list[str]:
    """`path:line: text` of each line that has one of the patterns as whole words."""
    known = re.compile(rf"(?<![\w-])(?:{'|'.join(patterns)})(?![\w-])", flags)
    return [
        f"{name}:{number}: {line.strip()[:100]}"
        for name, text in read(suffixes)
        if known.search(text)
        for number, line in enumerate(text.splitlines(), start=1)
        if known.search(line)
    ]


def test_private_names_are_gone():
    assert "\n".join(find(NAMES, (".py",))) == ""


def parts_of(name: str) -> set[str]:
    """The lower-case words of a name in snake case or camel case."""
    return {part.lower() for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


def names_in(tree: ast.AST) -> set[str]:
    """Names of classes, functions, arguments, variables and fields that a module defines."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return found


def test_no_name_has_a_private_word():
    found = [f"{path}: {name}" for path, tree in modules() for name in sorted(names_in(tree)) if parts_of(name) & PARTS]
    assert found == []


def test_a_class_name_is_one_idea():
    """Outside tests."""
    places = defaultdict(list)
    for path, tree in modules():
        if not path.startswith("tests/"):
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    places[node.name].append(path)
    shared = {name: paths for name, paths in places.items() if len(paths) > 1}
    assert {name: paths for name, paths in shared.items() if name not in SHARED_CLASS_NAMES} == {}
    assert SHARED_CLASS_NAMES.keys() <= shared.keys()
    assert [name for name, paths in shared.items() if len(paths) > 2] == []


def test_private_phrases_are_gone():
    assert "\n".join(find(PHRASES, (".py", ".md", ".yaml"), re.IGNORECASE)) == ""


def test_nouns_stand_where_english_has_them():
    found = [
        row
        for row in find(PRONOUNS, (".py", ".md"), re.IGNORECASE)
        if row.startswith(ROOMS)
        and not row.startswith(("docs/adr/", "docs/reference/"))
        and not any(words in row for words in QUOTED)
    ]
    assert "\n".join(found) == ""


def test_no_file_is_long():
    long = {name: text.count("\n") for name, text in read((".py",)) if text.count("\n") > MOST_LINES}
    assert long == {}


def functions() -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Each function of the sources and tests with its place."""
    return [
        (f"{name}:{node.lineno}: {node.name}", node)
        for name, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def test_no_function_is_long():
    lengths = {place: node.end_lineno - node.lineno + 1 for place, node in functions() if node.end_lineno}
    assert {place: length for place, length in lengths.items() if length > MOST_FUNCTION_LINES} == {}


def test_docstrings_are_sentences():
    """Outside tests. A method without one implements an interface that has it."""
    absent, short = [], []
    for name, tree in modules():
        if name.startswith("tests/"):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                words = ast.get_docstring(node)
                if words is None and node in tree.body and not node.name.startswith("_"):
                    absent.append(f"{name}:{node.lineno}: {node.name}")
                elif words is not None and len(words.split()) < LEAST_WORDS:
                    short.append(f"{name}:{node.lineno}: {node.name}")
    assert (absent, short) == ([], [])


def test_docstrings_say_something_themselves():
    found = []
    for name, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                words = ast.get_docstring(node) or ""
                if MODULE.search(words):
                    found.append(f"{name}:{node.lineno}: {node.name}")
    assert found == []
