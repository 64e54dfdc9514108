"""For models whose experts vLLM cannot balance its balancer stays off; else the engine dies at its first request."""

import json
from pathlib import Path
from typing import Any

import pytest
from moe_agent.experts.obstacle import forget_obstacle, note_obstacle, read_obstacle
from moe_agent.vllm.balanceable import ask_in_process, balance_where_possible, declares_interface, find_obstacle

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "torch_dtype": "float32",
}


@pytest.fixture(scope="module", autouse=True)
def vllm_loaded(virtual_engines: Any) -> None:
    """The session's fixture loads vLLM once, with its own warnings aside."""


@pytest.mark.parametrize(
    ("architecture", "can"),
    [
        ("Qwen3MoeForCausalLM", True),
        ("MixtralForCausalLM", True),
        ("DeepseekV3ForCausalLM", True),
        ("FlexOlmoForCausalLM", True),
        ("OlmoeForCausalLM", False),
        ("Qwen2MoeForCausalLM", False),
        ("PhiMoEForCausalLM", False),
        ("GraniteMoeForCausalLM", False),
        ("Qwen3ForCausalLM", False),
    ],
)
def test_a_class_of_vllm_declares_whether_its_experts_can_be_balanced(architecture, can):
    from vllm import ModelRegistry

    assert declares_interface(ModelRegistry.models[architecture].load_model_cls()) is can


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes vLLM's arguments for a small model of an architecture, with the balancer asked for."""
    import vllm.config.parallel as parallel
    from moe_agent.vllm.cpu_config import BalancingPlatform
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setattr(parallel, "current_platform", BalancingPlatform(parallel.current_platform))
    monkeypatch.setattr(EngineArgs, "create_model_config", EngineArgs.create_model_config)

    def make(architecture: str, model_type: str) -> EngineArgs:
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "config.json").write_text(
            json.dumps(SMALL | {"architectures": [architecture], "model_type": model_type})
        )
        return EngineArgs(
            model=str(folder),
            skip_tokenizer_init=True,
            tensor_parallel_size=2,
            distributed_executor_backend="mp",
            enable_expert_parallel=True,
            enable_eplb=True,
        )

    return make


@pytest.mark.parametrize(
    ("architecture", "model_type", "obstacle"),
    [
        ("OlmoeForCausalLM", "olmoe", "cannot balance the experts of OlmoeForCausalLM"),
        ("Qwen3MoeForCausalLM", "qwen3_moe", ""),
        ("Qwen3MoeForSequenceClassification", "qwen3_moe", ""),
    ],
)
def test_the_balancer_stays_off_where_the_model_cannot_be_balanced(
    tmp_path, arguments, architecture, model_type, obstacle
):
    asked = arguments(architecture, model_type)
    balance_where_possible(tmp_path)
    config = asked.create_engine_config()
    assert config.parallel_config.enable_eplb is not bool(obstacle)
    assert config.parallel_config.enable_expert_parallel
    assert read_obstacle(tmp_path).endswith(obstacle)
    assert bool(read_obstacle(tmp_path)) is bool(obstacle)


def test_a_rank_that_found_an_obstacle_keeps_the_balancer_off_at_the_next_start(tmp_path, arguments):
    note_obstacle(tmp_path, "its part for language has no experts")
    asked = arguments("Qwen3MoeForCausalLM", "qwen3_moe")
    balance_where_possible(tmp_path)
    assert not asked.create_engine_config().parallel_config.enable_eplb
    assert read_obstacle(tmp_path) == "its part for language has no experts"


def test_an_agent_forgets_what_an_earlier_one_found_out_of_another_model(tmp_path):
    note_obstacle(tmp_path, "cannot")
    forget_obstacle(tmp_path)
    forget_obstacle(tmp_path)
    assert read_obstacle(tmp_path) == ""


class Registered:
    """A class of vLLM's registry that was imported before."""

    def __init__(self, model_cls: type) -> None:
        self._model_cls = model_cls

    def load_model_cls(self) -> type:
        return self._model_cls


class Registry:
    def __init__(self, model_cls: type) -> None:
        self.models = {"Model": Registered(model_cls)}

    def _normalize_arch(self, architecture: str, config: "Config") -> str:
        return architecture.removesuffix("Renamed")


class Config:
    architecture = "Model"

    def __init__(self, model_cls: type, *, multimodal: bool) -> None:
        self.registry, self.is_multimodal_model = Registry(model_cls), multimodal


@pytest.mark.parametrize(("multimodal", "obstacle"), [(False, True), (True, False)])
def test_of_a_multimodal_model_the_loaded_part_for_language_decides(multimodal, obstacle):
    assert bool(find_obstacle(Config(type("Model", (), {}), multimodal=multimodal))) is obstacle


@pytest.mark.parametrize(("module", "name", "can"), [("json", "JSONDecoder", False), ("json", "Missing", None)])
def test_a_process_of_its_own_says_whether_a_class_declares_the_interface(module, name, can):
    if can is None:
        with pytest.raises(RuntimeError, match=r"cannot import the model's class json.Missing: AttributeError"):
            ask_in_process(module, name)
    else:
        assert ask_in_process(module, name) is can


def test_an_architecture_that_the_registry_does_not_have_is_judged_once_it_is_loaded():
    config = Config(type("Model", (), {}), multimodal=False)
    config.architecture = "Unknown"
    assert find_obstacle(config) == ""
    config.architecture = "ModelRenamed"
    assert find_obstacle(config).endswith("cannot balance the experts of ModelRenamed")


def test_a_class_that_was_imported_before_is_asked_at_once():
    interface = type("MixtureOfExperts", (), {})
    assert find_obstacle(Config(type("Model", (interface,), {}), multimodal=False)) == ""
