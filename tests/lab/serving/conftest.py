"""Short pauses, and a copy of the sample with a model folder that looks like one."""

import json
from pathlib import Path

import pytest
from moe_lab.serving import measurement
from moe_tools.deployment import SAMPLE, find_checkout


@pytest.fixture(autouse=True)
def short(monkeypatch) -> None:
    monkeypatch.setattr(measurement, "WARM_UP_S", 0.05)
    monkeypatch.setattr(measurement, "SETTLE_S", 0.0)


@pytest.fixture
def manifest(tmp_path) -> Path:
    """The sample, with a model that looks like one."""
    (tmp_path / "manifests").mkdir()
    path = tmp_path / SAMPLE
    path.write_text((find_checkout() / SAMPLE).read_text())
    model = tmp_path / ".cache" / "models" / "tiny"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps({"num_experts": 16}))
    return path
