"""What the operator writes for an agent, for every sample resource, is what the agent takes."""

import json
from pathlib import Path

import pytest
import yaml
from moe_contract.agent_config import load_agent_config
from moe_operator.api.resource import MoEServing
from moe_operator.plan import pods
from moe_operator.plan.names import CONFIG, Names

SAMPLES = sorted((Path(__file__).parents[2] / "manifests").glob("*.yaml"))


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda path: path.stem)
def test_the_file_of_a_pod_and_the_settings_over_it_are_taken(tmp_path, sample):
    (document,) = yaml.safe_load_all(sample.read_text())
    resource = MoEServing.model_validate(document)
    template = pods.build_engine_template(resource, Names("tiny"), pods.Defaults(), "stable", "digest")
    written = json.loads(template["metadata"]["annotations"][CONFIG])
    (path := tmp_path / "agent.json").write_text(json.dumps(written))
    # Nothing of a pod is in it, and the settings stand in a file of their own.
    assert not {"name", "request", "expert"} & written.keys()
    assert load_agent_config(path).model_dump(mode="json") == pods.build_agent_config(resource).model_dump(mode="json")
    (laid := tmp_path / "request.json").write_text(pods.build_request_file(resource))
    path.write_text(json.dumps(written | {"settings_file": str(laid)}))
    taken = load_agent_config(path)
    for section, settings in json.loads(laid.read_text()).items():
        assert pods.as_json(getattr(taken, section)) == settings
