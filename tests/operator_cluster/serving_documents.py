"""Resources of these tests, as people write them."""

from copy import deepcopy
from pathlib import Path
from typing import Any

Document = dict[str, Any]
CRD = Path(__file__).parents[2] / "crds" / "moeserving.yaml"
MINIMAL: Document = {
    "apiVersion": "moeserving.dev/v1alpha1",
    "kind": "MoEServing",
    "metadata": {"name": "tiny"},
    "spec": {"model": {"uri": "hf://org/tiny"}},
}


def serving(name: str = "tiny", **sections: Any) -> Document:
    """A resource with these sections of its spec."""
    document = deepcopy(MINIMAL)
    document["metadata"]["name"] = name
    document["spec"] |= sections
    return document
