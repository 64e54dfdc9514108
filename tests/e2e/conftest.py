"""Fixtures of the end-to-end tests: the operator installed by Helm, and a resource of a test's own."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_products import engine_pod_template, import_products
from deployed import OPERATOR_NAMESPACE, ROOT, Kubectl, Serving, helm


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """The small trained model, made once in the checkout's cache."""
    folder = ROOT / ".cache" / "models" / "tiny"
    if not (folder / "config.json").is_file():
        subprocess.run([ROOT / ".venv/bin/moeserving", "model", "tiny", folder], check=True, timeout=900)
    # One that an earlier release made is readable for its owner alone.
    (folder / "model.safetensors").chmod(0o644)
    return folder


@pytest.fixture(scope="session")
def operator(node_cluster: Any) -> Kubectl:
    """The operator, installed by Helm as README says, with images that were made here."""
    values = import_products(node_cluster)
    sets = [argument for name, value in values.items() for argument in ("--set", f"{name}={value}")]
    helm(
        node_cluster,
        "install",
        "moeserving",
        str(ROOT / "charts/moeserving"),
        "--namespace",
        OPERATOR_NAMESPACE,
        "--create-namespace",
        "--wait",
        "--timeout=180s",
        *sets,
    )
    return Kubectl(node_cluster, OPERATOR_NAMESPACE)


@pytest.fixture
def serving(operator: Kubectl, node_cluster: Any, namespace: str, tiny_model: Path) -> Iterator[Serving]:
    """A resource in a namespace of its own."""
    made = Serving(Kubectl(node_cluster, namespace), engine_pod_template(), tiny_model)
    yield made
    made.kubectl("delete", "moes", "--all", "--timeout=240s")
