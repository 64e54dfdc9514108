"""What docs/install.md and docs/autoscaling.md show is what the product takes."""

import re
from pathlib import Path

import pytest
import yaml
from moe_operator.api.parse import parse_resource
from moe_operator.autoscale.settings import fleet_settings

ROOT = Path(__file__).resolve().parents[2]
INSTALL = (ROOT / "docs/install.md").read_text()
AUTOSCALING = (ROOT / "docs/autoscaling.md").read_text()


def snippets(text):
    return re.findall(r"^```yaml\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def placed(snippet):
    """A part of a resource at its place: by its first line, which is indented as it is in a whole one."""
    if snippet.startswith("spec:"):
        return snippet
    return f"spec:\n  autoscaling:\n{snippet}"


def autoscaled():
    for snippet in snippets(AUTOSCALING):
        document = yaml.safe_load(placed(snippet))
        document["spec"]["model"] = {"uri": "hf://org/model"}
        yield {"apiVersion": "moeserving.dev/v1alpha1", "kind": "MoEServing", "metadata": {"name": "a"}} | document


def test_the_first_model_is_the_smallest_sample():
    (snippet,) = snippets(INSTALL)
    assert yaml.safe_load(snippet) == yaml.safe_load((ROOT / "manifests/minimal.yaml").read_text())


@pytest.mark.parametrize("document", list(autoscaled()), ids=lambda document: ",".join(document["spec"]["autoscaling"]))
def test_each_example_of_autoscaling_is_one(document):
    settings = fleet_settings(parse_resource(document).spec.autoscaling)
    assert settings.max_replicas >= settings.min_replicas


def test_the_values_that_the_installation_names_exist():
    values = yaml.safe_load((ROOT / "charts/moeserving/values.yaml").read_text())
    named = set(re.findall(r"`([a-z][A-Za-z]+(?:\.[A-Za-z]+)?)(?:: [^`]*)?`", INSTALL))
    ours = {name for name in named if name.split(".")[0] in values}
    assert {"images.registry", "watchNamespaces", "crds.install", "crds.keep", "replicas", "workers"} <= ours
    for name in ours:
        place = values
        for key in name.split("."):
            assert key in place, name
            place = place[key]
