"""Each request for an engine with an agent shows that it comes from a gateway of the deployment."""

import os

from moe_contract.peer_tokens import derive_peer_token

from tests.gateway.clients import TOKEN
from tests.gateway.messages import post, prompt
from tests.gateway.waiting import until

HEADER = b"x-moeserving-peer"


async def test_an_engine_with_an_agent_is_shown_the_token_and_a_plain_server_is_not(make_engine, serve):
    for agent, value in ((True, derive_peer_token(TOKEN.encode())), (False, None)):
        engine = await make_engine(agent=agent)
        served = await serve(engine)
        assert (await served.ask(post(prompt()))).status == 200
        assert engine.requests[0].headers.get(HEADER) == value
        assert engine.requests[0].head.endswith(b"\r\n\r\n")


async def test_a_rotated_token_is_shown_at_once(make_engine, serve, tmp_path):
    engine = await make_engine()
    served = await serve(engine)
    (tmp_path / "new").write_text(f"new\n{TOKEN}\n")
    os.replace(tmp_path / "new", tmp_path / "token")
    new, old = derive_peer_token(b"new"), derive_peer_token(TOKEN.encode())
    await until(lambda: new in served.gateway._peer_tokens.head_end, "the new token")
    await served.ask(post(prompt()))
    assert engine.requests[0].headers[HEADER] == new + b"," + old
