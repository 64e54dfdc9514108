"""`moeserving experts plan --load`: a plan from files, and files that are none."""

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moe_operator.cli.command import app
from typer.testing import CliRunner

GROUP = ("--ranks", "2", "--redundant", "2")


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["experts", "plan", *(str(argument) for argument in arguments)])
    assert result.exit_code == code, result.output
    return result.output


def saved(folder: Path, **arrays: Any) -> Path:
    path = folder / "load.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture
def load(tmp_path: Path) -> Path:
    return saved(tmp_path, load=np.random.default_rng(0).pareto(1.2, (2, 3, 16)) * 1000)


def test_a_plan_shows_balance_moves_traffic_and_time(load: Path, tmp_path: Path) -> None:
    said = run("--load", load, *GROUP, "--nodes", "2", "--json", tmp_path / "plan.json")
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert list(plan) == [
        "physical_to_logical", "seconds", "moves", "balance_before", "balance_after", "gate",
    ]  # fmt: skip
    assert f"balance    {plan['balance_before']:.3f} -> {plan['balance_after']:.3f}" in said
    assert f"moves      {plan['moves']}, " in said
    assert "to other nodes" in said
    assert f"decided in {plan['seconds'] * 1e3:.1f} ms" in said
    assert plan["gate"].startswith("move: ")
    assert 1.0 <= plan["balance_after"] < plan["balance_before"]
    assert [sorted(set(row)) for row in plan["physical_to_logical"]] == [list(range(16))] * 3


def test_the_same_files_give_the_same_bytes_but_for_the_time(load: Path, tmp_path: Path) -> None:
    plans = []
    for name in ("a.json", "b.json"):
        run("--load", load, *GROUP, "--json", tmp_path / name)
        plans.append(json.loads((tmp_path / name).read_text()))
    assert plans[0].pop("seconds") > 0
    assert plans[1].pop("seconds") > 0
    assert json.dumps(plans[0]) == json.dumps(plans[1])


def test_a_plan_is_a_placement_to_go_on_from(load: Path, tmp_path: Path) -> None:
    plan, next_plan = tmp_path / "plan.json", tmp_path / "next.json"
    run("--load", load, *GROUP, "--json", plan)
    run("--load", load, *GROUP, "--current", plan, "--json", next_plan)
    first, second = json.loads(plan.read_text()), json.loads(next_plan.read_text())
    assert second["balance_before"] == first["balance_after"]
    assert second["balance_after"] <= first["balance_after"]


def test_a_plan_is_shown_where_the_gate_says_stay(tmp_path: Path) -> None:
    path = saved(tmp_path, load=np.random.default_rng(0).pareto(1.2, (2, 3, 16)) * 1e-3)
    said = run("--load", path, *GROUP, "--json", tmp_path / "plan.json")
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["gate"].startswith("stay: would win")
    assert plan["balance_after"] < plan["balance_before"]
    assert plan["moves"] > 0
    assert "the engine would stay" in said


def pickled(folder: Path) -> Path:
    path = folder / "load.npz"
    np.savez(path, load=np.array([[[{"a": 1}]]], dtype=object))
    return path


def raw(folder: Path, data: bytes) -> Path:
    path = folder / "load.npz"
    path.write_bytes(data)
    return path


def zipped(folder: Path, data: bytes) -> Path:
    path = folder / "load.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("load.npy", data)
    return path


def huge(folder: Path) -> Path:
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 1000000, 1000000), }"
    header += b" " * (117 - len(header)) + b"\n"
    return zipped(folder, b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


def single(folder: Path) -> Path:
    path = folder / "load.npz"
    with path.open("wb") as file:
        np.save(file, np.ones((1, 1, 4)))
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "absent.npz", "cannot be read: no such file or directory"),
        (lambda folder: folder, "cannot be read: is a directory"),
        (lambda folder: raw(folder, b""), "is no npz file"),
        (lambda folder: raw(folder, b"not one"), "is no npz file"),
        (lambda folder: raw(folder, pickle.dumps({"load": 1})), "is no npz file; pickled data is not read"),
        (lambda folder: raw(folder, b"PK\x03\x04 cut off"), "is no npz file, or a damaged one"),
        (lambda folder: zipped(folder, b"\x93NUMPY\x01\x00\x02\x00{}"), "is no npz file, or a damaged one"),
        (lambda folder: zipped(folder, b"text"), "load is no array"),
        (huge, "is larger than the memory of this machine"),
        (single, "is a single array; an npz file is needed"),
        (pickled, "holds pickled objects, which are not read"),
        (lambda folder: saved(folder, tokens=np.ones(3)), "has no array 'load'; it has: tokens"),
        (saved, "has no array 'load'; it has: none"),
        (lambda folder: saved(folder, load=np.ones((3, 16))), "must be [source, layer, expert] and not empty"),
        (lambda folder: saved(folder, load=np.float64(1)), "it is a single number"),
        (lambda folder: saved(folder, load=np.ones((1, 0, 16))), "it is 1x0x16"),
        (lambda folder: saved(folder, load=np.full((1, 1, 1), "a")), "load must be numbers, not <U1"),
        (lambda folder: saved(folder, load=np.full((1, 1, 1), 1j)), "load must be numbers, not complex128"),
        (lambda folder: saved(folder, load=np.array([[[1, np.nan]]])), "load[0, 0, 1] must be finite; it is nan"),
        (lambda folder: saved(folder, load=np.array([[[-1, 2]]])), "load[0, 0, 0] must be not negative; it is -1.0"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_load_is_one_line_with_its_path(make: Any, message: str, tmp_path: Path) -> None:
    path = make(tmp_path)
    said = run("--load", path, "--ranks", "1", "--redundant", "0", code=2)
    assert message in said
    assert str(path) in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--ranks", "3"),
            "--redundant: 16 experts and 0 redundant ones do not divide evenly by 3 ranks; "
            "2, 5, 8, ... redundant ones do",
        ),
        (("--ranks", "4", "--nodes", "3"), "--nodes: 4 ranks do not divide evenly by 3 nodes"),
        (("--ranks", "1"), "--ranks: the load's 2 sources do not divide 1 ranks evenly"),
        ((), "--ranks: is needed with --load"),
        (("--ranks", "2", "--engine", "a"), "--engine: is of a running engine; leave it out with --load"),
        (("NAME", "--ranks", "2"), "NAME: is of a running engine; leave it out with --load"),
    ],
)
def test_a_group_that_cannot_be_is_refused(load: Path, options: tuple[str, ...], message: str) -> None:
    assert run("--load", load, *options, code=2) == f"{message}\n"


@pytest.mark.parametrize("option", ["--ranks", "--nodes", "--redundant", "--current"])
def test_a_group_without_a_load_is_refused(option: str) -> None:
    assert run(option, "2", code=2) == f"{option}: needs --load; the group of a running engine is known\n"


ROW = [*range(16), 0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "has no physical_to_logical, a list of layers"),
        ('{"physical_to_logical": 3}', "has no physical_to_logical, a list of layers"),
        (json.dumps({"physical_to_logical": []}), "must be 3 layers of 18 slots; it is 0 layers of no slots"),
        (json.dumps({"physical_to_logical": [ROW] * 2}), "must be 3 layers of 18 slots; it is 2 layers of 18 slots"),
        (json.dumps({"physical_to_logical": [ROW, ROW, ROW[1:]]}), "it is 3 layers of 17 or 18 slots"),
        (json.dumps({"physical_to_logical": [ROW, ROW, 7]}), "it is 3 layers of 0 or 18 slots"),
        (json.dumps({"physical_to_logical": [ROW, ROW, [*ROW[:-1], -1]]}), "[2][17] must be an expert's number"),
        (json.dumps({"physical_to_logical": [ROW, ROW, [*ROW[:-1], 0.5]]}), "must be an expert's number, not 0.5"),
        (json.dumps({"physical_to_logical": [ROW, ROW, [*ROW[:-1], True]]}), "must be an expert's number, not True"),
        (json.dumps({"physical_to_logical": [ROW, ROW, [*ROW[:-1], 16]]}), "layer 2, slot 17: no expert 16"),
        (json.dumps({"physical_to_logical": [ROW, [0, 0, *ROW[2:]], ROW]}), ""),
        (json.dumps({"physical_to_logical": [ROW, [0, 0, *ROW[2:-1], 0], ROW]}), "layer 1: expert 1 has no slot"),
    ],
)  # fmt: skip
def test_a_placement_that_does_not_fit_is_one_line_with_its_path(
    load: Path, tmp_path: Path, text: str, message: str
) -> None:
    current = tmp_path / "current.json"
    current.write_text(text)
    said = run("--load", load, *GROUP, "--current", current, code=2 if message else 0)
    assert message in said
    if message:
        assert said.startswith(str(current))
        assert said.count("\n") == 1


def test_a_placement_that_is_not_there_is_named(load: Path, tmp_path: Path) -> None:
    said = run("--load", load, *GROUP, "--current", tmp_path / "absent.json", code=2)
    assert said == f"{tmp_path / 'absent.json'}: cannot be read: no such file or directory\n"


def test_a_place_to_write_to_that_is_none_is_named(load: Path, tmp_path: Path) -> None:
    said = run("--load", load, *GROUP, "--json", tmp_path / "absent" / "plan.json", code=1)
    assert "absent/plan.json: no such file or directory" in said
