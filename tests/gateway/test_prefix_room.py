"""How much the gateway remembers of an engine's prompts follows the room for KV blocks that the engine reports."""

from moe_contract.gateway_config import GatewayConfig
from moe_gateway.engines.dispatcher import Dispatcher
from moe_gateway.request.parsing import Parsed
from moe_scheduling.engine.choice import Send, SendReason
from moe_scheduling.engine.prefix_index import DEFAULT_CAPACITY_BLOCKS
from moe_scheduling.signals import EngineSignal, Target

TARGET = Target("e0")
TOKENS_OF_BLOCK = 128
LONG = 2 * DEFAULT_CAPACITY_BLOCKS
PROMPT = Parsed(None, False, 0, None, b"", LONG * TOKENS_OF_BLOCK, prompt_bytes=LONG * 512, keys=tuple(range(LONG)))


def cached_part(dispatcher: Dispatcher) -> float:
    """Part of a prompt that is taken to be cached after it was sent."""
    job, keys = dispatcher.build_job(PROMPT, None)
    dispatcher.send(job, keys, None, Send(TARGET, 0.0, SendReason.LEAST_PREDICTED), 0.0)
    return dispatcher.build_job(PROMPT, None)[0].cached[TARGET] / (LONG * TOKENS_OF_BLOCK)


def make(kv_tokens: int) -> Dispatcher:
    config = GatewayConfig.model_validate(
        {"listen": {"port": 1}, "admin": {"port": 2}, "engines": [{"name": "e0", "url": "http://x:1"}]}
    )
    dispatcher = Dispatcher(config)
    dispatcher.observe(TARGET, EngineSignal(kv_tokens=kv_tokens), 0.0, 0.0)
    return dispatcher


def test_an_engine_with_more_room_has_more_of_a_prompt():
    assert cached_part(make(0)) == 0.5
    assert cached_part(make(1000)) == 0.5
    assert cached_part(make(LONG * TOKENS_OF_BLOCK)) == 1.0


def test_another_process_says_anew_how_much_room_it_has():
    dispatcher = make(LONG * TOKENS_OF_BLOCK)
    dispatcher.set_process("e0", 1)
    dispatcher.set_process("e0", 2)
    assert cached_part(dispatcher) == 0.5
