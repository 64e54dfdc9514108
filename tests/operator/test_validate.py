"""`moeserving validate`, `plan` and `crd`: what a person sees, and that no file whatever ends in a traceback."""

import contextlib
import os
import threading
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from hypothesis import given
from hypothesis import strategies as st
from moe_contract.input_errors import InvalidInput
from moe_operator.api import parse_resource, set_field
from moe_operator.api.crd import render_crd
from moe_operator.api.document import MAX_BYTES, parse_document
from moe_operator.cli.plan import plan
from moe_operator.cli.validate import crd, one_line, validate
from typer.testing import CliRunner, Result

ROOT = Path(__file__).parents[2]
SAMPLES = sorted((ROOT / "manifests").glob("*.yaml"))
HEAD = "apiVersion: moeserving.dev/v1alpha1\nkind: MoEServing\nmetadata: {name: a}\n"
VALID = HEAD + "spec: {model: {uri: hf://org/a}}\n"

APP = typer.Typer()
for command in (validate, plan, crd):
    APP.command()(command)


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(APP, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def errors_of(path: Path) -> list[str]:
    result = run("validate", "-f", str(path))
    assert result.exit_code == 2
    assert result.stdout == ""
    return [line.replace(f"{path}", "FILE") for line in result.stderr.splitlines()]


def errors_in(text: str | bytes, tmp_path: Path) -> list[str]:
    path = tmp_path / "a.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return errors_of(path)


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_a_valid_file_is_said_to_be_so(path: Path) -> None:
    result = run("validate", "-f", str(path))
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{path}: valid\n", "")


def test_a_null_that_a_client_side_apply_would_leave_out_is_a_note(tmp_path: Path) -> None:
    probe = "containers: [{name: engine, startupProbe: null, livenessProbe: {$patch: delete}}]"
    template = f"{{spec: {{{probe}, tolerations: null}}}}"
    file = tmp_path / "a.yaml"
    file.write_text(HEAD + f"spec: {{model: {{uri: hf://org/a}}, engine: {{podTemplate: {template}}}}}\n")
    result = run("validate", "-f", str(file))
    assert (result.exit_code, result.stdout) == (0, f"{file}: valid\n")
    places = [line.split(": ")[1] for line in result.stderr.splitlines()]
    assert places == [
        "spec.engine.podTemplate.spec.containers[0].startupProbe",
        "spec.engine.podTemplate.spec.tolerations",
    ]
    assert all("`$patch: delete` always does" in line for line in result.stderr.splitlines())


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        (
            "{model: {uri: hf://org/a, cache: {path: /dev/shm}}}",
            "spec.model.cache.path: /dev/shm is, holds or lies in /dev/shm, a folder of the deployment's own",
        ),
        (
            "{model: {uri: hf://org/a}, gateway: {podTemplate: {spec: {volumes: [{name: config, emptyDir: {}}]}}}}",
            "spec.gateway.podTemplate.spec.volumes[0]: "
            "the volume 'config' is the operator's own; give yours another name",
        ),
        ("{model: {uri: pvc:///a}}", "spec.model.uri: the name of a claim is needed, such as pvc://models/qwen3"),
    ],
)
def test_an_error_that_only_a_plan_finds_is_found(spec: str, error: str, tmp_path: Path) -> None:
    assert errors_in(f"{HEAD}spec: {spec}\n", tmp_path) == [error]


def test_each_error_is_one_line_on_stderr(tmp_path: Path) -> None:
    spec = "spec:\n  model: {uri: hf://org/a}\n  scheduling: {request: {policy: sjff}}\n  enginee: {}\n"
    assert errors_in(HEAD + spec, tmp_path) == [
        "spec.enginee: unknown field; nearest known: engine; "
        "known: autoscaling, commonMetadata, disruption, engine, gateway, metrics, model, networkPolicy, paused, "
        "scheduling",
        "spec.scheduling.request.policy: unknown 'sjff'; known: fcfs, priority, sjf",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "FILE: is empty"),
        ("---\n", "FILE: is empty"),
        ("# only a comment\n", "FILE: is empty"),
        (b"\x7fELF\x02\x01\x01\x00\x00\x00", "FILE: is not text in UTF-8"),
        (b"name: \xff\xfe\n", "FILE: is not text in UTF-8"),
        (
            "a: [1, 2\nb: 3\n",
            "FILE: is not YAML: while parsing a flow sequence: expected ',' or ']', but got ':' at line 2",
        ),
        ("a: 'open\n", "FILE: is not YAML: while scanning a quoted scalar: found unexpected end of stream at line 2"),
        ("a: *b\n", "FILE: is not YAML: found undefined alias 'b' at line 1"),
        (
            "a: !!python/object/apply:os.getcwd []\n",
            "FILE: is not YAML: could not determine a constructor for the tag "
            "'tag:yaml.org,2002:python/object/apply:os.getcwd' at line 1",
        ),
        ("- a\n- b\n", "a mapping with apiVersion, kind, metadata and spec is needed, got a list"),
        ("just text\n", "a mapping with apiVersion, kind, metadata and spec is needed, got 'just text'"),
        (VALID + "---\n" + VALID, "FILE: holds more than one document (the second at line 6)"),
        ("a: {b: 1, b: 2}\n", "a.b: stands twice, at lines 1 and 1"),
        ("a:\n- b: 1\n  b: 2\n", "a[0].b: stands twice, at lines 2 and 3"),
        ("a: {1: 2}\n", "a: a key must be a string, got '1' at line 1"),
        ("a: {[x]: 2}\n", "a: a key must be a string, got a list or mapping at line 1"),
        ("a: &a [*a]\n", "FILE: expands to more than 100000 values"),
        ("[" * 2000, "FILE: values are nested more than 64 deep"),
        ("a: !!timestamp 2024-13-45\n", "FILE: holds a value that cannot be read: month must be in 1..12"),
        ("a" * (MAX_BYTES + 1), f"FILE: is larger than {MAX_BYTES} bytes"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_file_that_holds_no_document_is_reported_in_one_line(text: str | bytes, line: str, tmp_path: Path) -> None:
    assert errors_in(text, tmp_path) == [line]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2024-01-01", "2024-01-01"),
        ("2024-01-01 10:00:00", "2024-01-01 10:00:00"),
        ("80:80", "80:80"),
        ("12:30:45.5", "12:30:45.5"),
        ("-1:20", "-1:20"),
        ("010", 8),
        ("1_000", 1000),
        ("off", False),
        ("1.5", 1.5),
    ],
)
def test_a_bare_value_is_what_kubectl_reads(text: str, value: object) -> None:
    assert parse_document(f"a: {text}\n", "FILE") == {"a": value}


def test_a_null_that_a_server_side_apply_refuses_is_a_note(tmp_path: Path) -> None:
    spec = (
        "{model: {uri: hf://org/a, cache: null}, engine: {image: null, replicas: null}, gateway: null, autoscaling: ~}"
    )
    file = tmp_path / "a.yaml"
    file.write_text(HEAD + f"spec: {spec}\n")
    result = run("validate", "-f", str(file))
    assert (result.exit_code, result.stdout) == (0, f"{file}: valid\n")
    places = [line.split(": ")[1] for line in result.stderr.splitlines()]
    assert places == ["spec.model.cache", "spec.engine.image", "spec.autoscaling"]
    assert all("a null is refused by `kubectl apply --server-side`" in line for line in result.stderr.splitlines())


def test_a_grace_period_that_cuts_streams_is_a_note(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    template = "{podTemplate: {spec: {terminationGracePeriodSeconds: SECONDS}}}"
    for seconds, is_noted in ((20, True), (142, True), (143, False)):
        engine = template.replace("SECONDS", str(seconds))
        file.write_text(HEAD + f"spec: {{model: {{uri: hf://org/a}}, engine: {engine}}}\n")
        result = run("validate", "-f", str(file))
        place = "note: spec.engine.podTemplate.spec.terminationGracePeriodSeconds: "
        said = f"{seconds} s are less than engine.drainTimeout and its margin, 143 s: streams may be cut\n"
        assert (result.exit_code, result.stderr) == (0, place + said if is_noted else "")


def test_half_of_a_character_is_refused_wherever_it_stands(tmp_path: Path) -> None:
    metadata = 'metadata: {name: a, annotations: {note: "\\ud800"}}\n'
    text = VALID.replace("metadata: {name: a}\n", metadata)
    assert errors_in(text, tmp_path) == ["FILE: holds half of a character at line 3"]
    assert errors_in('a: {"\\udfff": 1}\n', tmp_path) == ["FILE: holds half of a character at line 1"]


def test_what_a_cluster_gives_is_as_valid_as_what_was_applied(tmp_path: Path) -> None:
    live = yaml.safe_load(VALID)
    live["metadata"] |= {
        "uid": "0-1",
        "resourceVersion": "7",
        "generation": 2,
        "creationTimestamp": "2026-01-01T00:00:00Z",
        "finalizers": ["moeserving.dev/drain"],
        "managedFields": [{"manager": "kubectl"}],
    }
    live["status"] = {"conditions": [], "aFieldOfALaterRelease": 1}
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump(live))
    assert run("validate", "-f", str(file)).exit_code == 0
    del live["metadata"]["uid"]
    assert "status.aFieldOfALaterRelease: unknown field" in errors_in(yaml.safe_dump(live), tmp_path)[0]
    live["metadata"]["finaliser"] = []
    assert "metadata.finaliser: unknown field" in errors_in(yaml.safe_dump(live), tmp_path)[0]


def test_a_list_that_is_none_is_called_so(tmp_path: Path) -> None:
    spec = "spec: {model: {uri: hf://org/a}, engine: {args: --a}}\n"
    assert errors_in(HEAD + spec, tmp_path) == ["spec.engine.args: a list is needed, got '--a'"]


def test_aliases_that_multiply_are_refused_before_they_are_expanded(tmp_path: Path) -> None:
    rows = ["a0: &a0 [x, x]"] + [f"a{index}: &a{index} [{', '.join([f'*a{index - 1}'] * 9)}]" for index in range(1, 30)]
    assert errors_in("\n".join(rows), tmp_path) == ["FILE: expands to more than 100000 values"]


def test_anchors_and_merges_of_sane_size_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    spec = "spec:\n  model: {uri: hf://org/a}\n  engine: &e {replicas: 2}\n"
    path.write_text(HEAD.replace("metadata: {name: a}", "metadata: &m {name: a}") + spec)
    assert run("validate", "-f", str(path)).exit_code == 0


def test_a_file_that_cannot_be_read_is_reported_in_one_line(tmp_path: Path) -> None:
    assert errors_of(tmp_path / "absent.yaml") == ["FILE: no such file"]
    assert errors_of(tmp_path) == ["FILE: is a folder, not a file"]
    assert errors_of(Path("/proc/self/mem")) == ["FILE: cannot be read: Input/output error"]
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert errors_of(tmp_path / "loop") == ["FILE: cannot be read: Too many levels of symbolic links"]


def test_a_pipe_is_read_as_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(VALID,))
    writer.start()
    assert run("validate", "-f", str(pipe)).exit_code == 0
    writer.join()


def test_a_key_that_would_break_the_line_is_written_out(tmp_path: Path) -> None:
    (line,) = errors_in(VALID.replace("spec: {", 'spec: {"a\\nb\\e[31m": 1, '), tmp_path)
    assert line.startswith("spec.a\\nb\\x1b[31m: unknown field")
    assert one_line("ü\t\u2028") == "ü\\t\\u2028"


def test_plan_for_one_machine_shows_agents_and_gateway_and_starts_nothing() -> None:
    result = run("plan", "-f", str(ROOT / "manifests" / "qwen3-30b-a3b.yaml"), "--local", "--gpus", "8")
    shown = yaml.safe_load(result.stdout)
    assert [agent["name"] for agent in shown["agents"]] == [f"qwen3-30b-a3b-engine-{index}" for index in range(4)]
    assert shown["gateway"]["listen"]["port"] == 8000


def test_plan_says_what_the_machine_lacks() -> None:
    result = run("plan", "-f", str(ROOT / "manifests" / "qwen3-30b-a3b.yaml"), "--local", "--gpus", "7")
    assert (result.exit_code, result.stderr) == (2, "spec.engine: needs 4 x 2 GPUs, the machine has 7\n")


def test_crd_prints_the_crd() -> None:
    assert run("crd").stdout == render_crd()


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates() | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place] * bool(place) + [found for key, child in below for found in places(child, (*place, key))]


@st.composite
def mutated_samples(draw: st.DrawFn) -> Any:
    document = deepcopy(yaml.safe_load(draw(st.sampled_from(SAMPLES)).read_text(encoding="utf-8")))
    for _ in range(draw(st.integers(1, 3))):
        *parents, last = draw(st.sampled_from(places(document)))
        section = document
        for key in parents:
            section = section[key]
        match draw(st.sampled_from(["replace", "remove", "add"])):
            case "replace":
                section[last] = draw(JUNK)
            case "remove":
                del section[last]
            case "add" if isinstance(section, dict):
                section[draw(st.text(max_size=6) | st.integers())] = draw(JUNK)
        if not places(document):
            break
    return document


@given(mutated_samples())
def test_a_mutated_document_is_valid_or_refused_with_paths_and_nothing_else(document: Any) -> None:
    with contextlib.suppress(InvalidInput):
        parse_resource(document)


@given(st.sampled_from(SAMPLES), st.data())
def test_mutated_text_is_a_document_or_refused_and_nothing_else(path: Path, data: st.DataObject) -> None:
    text = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        stop = data.draw(st.integers(start, min(len(text), start + 20)))
        text[start:stop] = data.draw(
            st.binary(max_size=4) | st.sampled_from([b"\t", b"&a", b"*a", b"<<: ", b"- ", b": ", b"!!", b"{", b"'"])
        )
    with contextlib.suppress(InvalidInput):
        parse_resource(parse_document(bytes(text), "text"))


@given(st.text(max_size=12), st.text(max_size=12))
def test_any_assignment_is_taken_or_refused_and_nothing_else(path: str, value: str) -> None:
    document = yaml.safe_load(VALID)
    for assignment in (f"{path}={value}", f"engine.{path}={value}", f"engine.env.A={value}", f"gateway.port={value}"):
        with contextlib.suppress(InvalidInput):
            parse_resource(set_field(document, assignment))
