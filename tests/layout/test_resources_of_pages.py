"""Every resource that a page shows is valid and can be planned, and every part of one fits into a whole one."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from documented_commands import Block, read_blocks
from moe_operator.api import parse_resource
from moe_operator.plan import Defaults, Observed, plan_cluster

ROOT = Path(__file__).resolve().parents[2]
# The recipes of docs/clusters.md have tests of their own (tests/operator/test_clusters_page.py).
PAGES = [ROOT / "README.md", *sorted(set((ROOT / "docs").rglob("*.md")) - {ROOT / "docs" / "clusters.md"})]
SECTIONS = frozenset(("spec", "model", "engine", "gateway", "scheduling", "autoscaling", "metrics", "networkPolicy"))
SMALLEST = {"model": {"uri": "hf://allenai/OLMoE-1B-7B-0924-Instruct"}}
Document = dict[str, Any]


def documents_of(block: Block) -> list[Document]:
    if block.is_shell or block.language not in ("", "yaml"):
        return []
    try:
        return [document for document in yaml.safe_load_all(block.text) if isinstance(document, dict)]
    except yaml.YAMLError:
        return []


FOUND = [
    (block.place, document) for page in PAGES for block in read_blocks(page, ROOT) for document in documents_of(block)
]
WHOLE = [(place, document) for place, document in FOUND if document.get("kind") == "MoEServing"]
PARTS = [(place, document) for place, document in FOUND if "kind" not in document and document.keys() <= SECTIONS]


def plan(document: Document) -> int:
    """The number of objects in the plan of a valid resource."""
    return len(plan_cluster(parse_resource(document), "models", Observed(tokens=("t",)), Defaults()).objects)


@pytest.mark.parametrize("document", [pytest.param(document, id=place) for place, document in WHOLE])
def test_each_resource_is_valid_and_has_a_plan(document: Document) -> None:
    assert plan(document) > 0


@pytest.mark.parametrize("document", [pytest.param(document, id=place) for place, document in PARTS])
def test_each_part_of_a_resource_fits_into_one(document: Document) -> None:
    spec = SMALLEST | document.get("spec", document)
    whole = {
        "apiVersion": "moeserving.dev/v1alpha1", "kind": "MoEServing", "metadata": {"name": "part"}, "spec": spec
    }  # fmt: skip
    assert plan(whole) > 0


def test_the_pages_have_resources() -> None:
    assert len(WHOLE) >= 5
    assert len(PARTS) >= 5
