"""The pages for people who come from plain vLLM and from KServe: both sides say the same, and every name exists."""

import re
import shlex
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from moe_operator.api import parse_resource
from moe_operator.api.crd import build_crd
from moe_operator.api.replica import OWNED_OPTIONS

DOCS = Path(__file__).parents[2] / "docs"
VLLM, KSERVE = ((DOCS / name).read_text("utf-8") for name in ("from-vllm.md", "from-kserve.md"))
SCHEMA = build_crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
SECTIONS = ("model", "engine", "scheduling", "gateway", "autoscaling")
# Files of vLLM that have its options, as literals or as fields of dataclasses.
SOURCES = ("engine/arg_utils.py", "entrypoints/**/cli_args.py")
Document = dict[str, Any]


def has_field(path: str) -> bool:
    """Whether the resource has a field of this path below `spec`."""
    place = SCHEMA
    for part in path.split("."):
        if part not in place:
            return False
        place = place[part].get("properties") or place[part].get("items", {}).get("properties") or {}
    return True


@pytest.mark.parametrize("page", [VLLM, KSERVE], ids=["vllm", "kserve"])
def test_each_field_exists(page: str) -> None:
    rows = [line.split("|")[2] for line in page.splitlines() if line.startswith("| ") and line.count("|") >= 4]
    named = {
        field.rstrip(":")
        for row in rows
        for field in re.findall(r"`([a-zA-Z.]+)(?:[:`])", row)
        if field.split(".")[0] in SECTIONS
    }
    assert len(named) > 8
    assert {field for field in named if not has_field(field)} == set()


def test_each_option_that_a_field_sets_is_in_the_table() -> None:
    spellings = {option for option in OWNED_OPTIONS if not option.startswith(("--no-", "--disable-"))}
    assert {option for option in spellings if f"`{option}`" not in VLLM} == set()


def test_vllm_has_each_option() -> None:
    found = find_spec("vllm")
    assert found is not None
    assert found.submodule_search_locations
    folder = Path(found.submodule_search_locations[0])
    sources = "".join(path.read_text("utf-8") for name in SOURCES for path in folder.glob(name))
    named = set(re.findall(r"`(--[a-z-]+)`", VLLM.partition("## Other behaviour")[0]))
    unknown = {
        option
        for option in named
        if f'"{option}"' not in sources and not re.search(rf"\b{option[2:].replace('-', '_')}\b ?:", sources)
    }
    assert unknown == set()


def resources(page: str) -> list[Document]:
    blocks = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    return [yaml.safe_load(block) for block in blocks]


def test_the_resource_says_what_the_command_says() -> None:
    (command,) = re.findall(r"```text\n(vllm serve .*?)```", VLLM, re.DOTALL)
    words = shlex.split(command.replace("\\\n", " "))
    values = dict(pairwise(words))
    engine = (spec := resources(VLLM)[0]["spec"])["engine"]
    assert spec["model"] == {"uri": f"hf://{values['serve']}", "name": values["--served-model-name"]}
    assert engine["parallelism"] == {"tensor": int(values["--tensor-parallel-size"]), "expert": True}
    assert engine["args"] == [f"{name}={values[name]}" for name in ("--max-model-len", "--max-num-seqs")]
    assert spec["gateway"]["port"] == int(values["--port"])


@pytest.mark.parametrize("at", [0, 2], ids=["LLMInferenceService", "InferenceService"])
def test_both_sides_of_kserve_name_one_model_of_one_size(at: int) -> None:
    theirs, ours = resources(KSERVE)[at : at + 2]
    spec = parse_resource(ours).spec
    assert (ours["kind"], theirs["metadata"]["name"]) == ("MoEServing", ours["metadata"]["name"])
    predictor = theirs["spec"].get("predictor")
    if predictor:
        model, container = predictor["model"], predictor["model"]
        assert (spec.model.uri, f"--model_name={spec.model.name}") == (model["storageUri"], model["args"][0])
        assert spec.autoscaling is not None
        bounds = (predictor["minReplicas"], predictor["maxReplicas"])
        assert (spec.autoscaling.min_replicas, spec.autoscaling.max_replicas) == bounds
    else:
        (container,) = theirs["spec"]["template"]["containers"]
        assert (spec.model.uri, spec.model.name) == (theirs["spec"]["model"]["uri"], theirs["spec"]["model"]["name"])
        assert spec.engine.replicas == theirs["spec"]["replicas"]
    limits = container["resources"]["limits"]
    assert ours["spec"]["engine"]["resources"]["memory"] == limits["memory"]
    shape = spec.engine.parallelism
    assert shape.tensor * shape.data == int(limits["nvidia.com/gpu"])
