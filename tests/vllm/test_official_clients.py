"""The official clients of OpenAI and Anthropic: what passes directly to a real engine passes through the gateway."""

import json
from typing import Any

import openai
import pytest

from tests.vllm import official_clients as clients
from tests.vllm.conftest import Gateway, request, run_javascript

JAVASCRIPT_CHECKS = 17
CHECKS = [
    *((clients.open_openai, check) for check in clients.OPENAI.values()),
    *((clients.open_anthropic, check) for check in clients.ANTHROPIC.values()),
]


@pytest.fixture(scope="module")
def agent(start_agent: Any, tiny_model: Any) -> Any:
    """An engine that keeps responses, calls tools and renders prompts."""
    flags = ("--enable-auto-tool-choice", "--tool-call-parser=hermes", "--enable-scale-out")
    details = ("--enable-prompt-tokens-details", "--enable-tokenizer-info-endpoint")
    environment = {"OMP_NUM_THREADS": "1", "VLLM_ENABLE_RESPONSES_API_STORE": "1", "VLLM_SERVER_DEV_MODE": "1"}
    return start_agent("clients", tiny_model, *flags, *details, env=environment)


@pytest.fixture(scope="module")
def gateway(agent: Any, tmp_path_factory: Any) -> Any:
    gateway = Gateway(tmp_path_factory.mktemp("gateway"), [agent], 1, {})
    gateway.wait_for("an engine", lambda state: state["engines"][0]["accepting"])
    yield gateway
    assert gateway.process.stop() == 0


@pytest.mark.parametrize(("client", "check"), CHECKS, ids=[check.__name__ for _, check in CHECKS])
def test_a_check_of_the_python_clients_passes_as_it_does_directly(agent, gateway, client, check):
    assert check(client(gateway.url)) == check(client(agent.url))


def test_all_checks_of_the_javascript_clients_pass_as_they_do_directly(agent, gateway):
    direct = run_javascript(agent.url)
    assert len(direct) == JAVASCRIPT_CHECKS
    assert not {name: value for name, value in direct.items() if isinstance(value, dict)}
    assert run_javascript(gateway.url) == direct


def test_one_model_is_found_by_its_name(gateway):
    client = clients.open_openai(gateway.url)
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("none")


@pytest.mark.parametrize("api", ["chat", "messages", "responses"])
def test_a_stream_that_the_client_closes_ends_in_the_engine(agent, gateway, api):
    if api == "messages":
        made = clients.MESSAGE | {"max_tokens": 2000, "stream": True}
        stream = clients.open_anthropic(gateway.url).messages.create(**made)
    elif api == "responses":
        made = clients.RESPONSE | {"max_output_tokens": 2000, "extra_body": clients.LONG, "stream": True}
        stream = clients.open_openai(gateway.url).responses.create(**made)
    else:
        made = clients.CHAT | {"max_tokens": 2000, "extra_body": clients.LONG, "stream": True}
        stream = clients.open_openai(gateway.url).chat.completions.create(**made)
    next(iter(stream))
    agent.wait_for("running", lambda state: state["ranks"][0]["running"] == 1, 20)
    stream.close()
    agent.wait_for("idle", lambda state: state["ranks"][0]["running"] == 0, 20)
    gateway.wait_for("idle", lambda state: state["in_flight"] == 0, 20)


RAW = {
    "/tokenize": {"prompt": "hello"},
    "/detokenize": {"tokens": [5, 6]},
    "/v1/completions/render": {"prompt": "hello"},
    "/v1/chat/completions/render": {"messages": clients.ASKED},
    "/v1/messages/render": {"messages": clients.ASKED, "max_tokens": 5},
    "/v1/responses/render": {"input": "hello"},
    "/v1/chat/completions/batch": {"messages": [clients.ASKED, clients.ASKED], "max_tokens": 4, "temperature": 0},
    "/generative_scoring": {"query": "a", "items": ["b", "c"], "label_token_ids": [5, 6]},
    "/inference/v1/generate": {"token_ids": [1, 2], "sampling_params": {"max_tokens": 3, "temperature": 0}},
}
VOLATILE = {"id", "request_id", "created", "created_at", "created_time"}


def stable(value: Any) -> Any:
    """A document without what differs from call to call."""
    if isinstance(value, dict):
        return {name: stable(inner) for name, inner in value.items() if name not in VOLATILE}
    return [stable(row) for row in value] if isinstance(value, list) else value


@pytest.mark.parametrize("path", RAW)
def test_a_route_without_a_client_answers_as_it_does_directly(agent, gateway, path):
    body = {"model": "tiny"} | RAW[path]
    status, answer = request("POST", gateway.url + path, body)
    assert status == 200, answer
    direct = agent.engine("POST", path, body)[1]
    assert json.dumps(stable(answer), sort_keys=True) == json.dumps(stable(direct), sort_keys=True)


@pytest.mark.parametrize("path", ["/v1/systemone", "/rerank", "/v1/score", "/classify", "/pooling", "/v2/embed"])
def test_what_the_model_cannot_do_is_refused_by_the_engine(agent, gateway, path):
    body = {"model": "tiny", "state": "x", "questions": {}}
    through, direct = request("POST", gateway.url + path, body), agent.engine("POST", path, body)
    assert through == direct
    assert through[0] >= 400


def test_admin_routes_stay_closed_and_the_agent_may_ask_whether_the_engine_sleeps(agent, gateway):
    for path in ("/pause", "/sleep", "/collective_rpc", "/inference/v1/abort_requests", "/v1/load_lora_adapter"):
        assert request("POST", gateway.url + path, {})[0] == 404
        assert agent.engine("POST", path, {})[0] == 404
    for name in ("is_sleeping", "is_paused"):
        assert request("GET", f"{gateway.url}/{name}")[0] == 404
        assert agent.engine("GET", f"/{name}") == (200, {name: False})


def test_the_refusal_within_a_stream_of_messages_counts_against_no_engine(gateway):
    """vLLM 0.32 sends an error with the code of the real one in its text."""
    before = gateway.state()
    form = {"format": {"type": "json_schema", "schema": {"type": "nonsense"}}}
    made = clients.MESSAGE | {"output_config": form, "stream": True}
    with pytest.raises(Exception, match="Gr"):
        list(clients.open_anthropic(gateway.url).messages.create(**made))
    after = gateway.state()
    assert after["totals"]["failed"] == before["totals"]["failed"]
    assert after["totals"]["requests"] > before["totals"]["requests"]
