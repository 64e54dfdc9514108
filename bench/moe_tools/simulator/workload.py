"""Requests of a run, with the content of their prompts, made from a trace.

The content is a name, not a text: pieces with equal ids hold equal tokens. The gateway sees it as bytes (4 a token, the
ratio that it starts from), vLLM as the hashes of its own blocks.

Invariants: equal pieces at equal places give equal bytes and equal hashes, and nothing else does; the same trace gives
the same content in every process.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from struct import pack

from moe_scheduling.request.fairness import ANONYMOUS_TENANT

from moe_tools.traces import TraceRequest

BYTES_PER_TOKEN = 4
VLLM_BLOCK_TOKENS = 16


@dataclass(slots=True, kw_only=True, eq=False)
class SimRequest:
    """One request and its progress. Times are seconds of the run; None until they have come.

    Attributes:
        index: number in the run, its identity.
        arrival_s: when it comes to a gateway.
        prompt_tokens: length of the prompt.
        output_tokens: length of the answer.
        pieces: ids of the prompt's pieces of `piece_tokens` each; empty: it shares nothing.
        piece_tokens: tokens of a piece.
        session: name of the session that it belongs to, or None.
        tenant: its sender.
        conversation: name of the conversation that it belongs to; empty: none. No gateway sees it.
        think_s: in a conversation, how long after the answer before it comes.
        priority: level; lower is more urgent.
        gateway: number of the gateway that it came to.
        sent_s: when it was last sent to an engine.
        first_token_s: when its first token was there.
        finished_s: when its last token was there.
        server: name of the server that it was last sent to.
        rank: rank there.
        cached_tokens: prompt tokens that its engine found in its prefix cache.
        predicted_s: seconds from sending to the first token that were predicted; None for policies that predict none.
        attempts: how often it was sent.
        failure: why it failed; empty while it has not.
        prefill_server: server that computed its prompt for another one; empty where that is `server`.
        prefilled_s: when its prompt was computed there.
    """

    index: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    pieces: tuple[int, ...] = ()
    piece_tokens: int = 512
    session: str | None = None
    tenant: int = 0
    conversation: str = ""
    think_s: float = 0.0
    priority: int = 0
    gateway: int = 0
    sent_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    server: str = ""
    rank: int = 0
    cached_tokens: int = 0
    predicted_s: float | None = None
    attempts: int = 0
    failure: str = ""
    prefill_server: str = ""
    prefilled_s: float | None = None

    @property
    def prefill_name(self) -> str:
        """Its id at the engine that computes its prompt for another one: another for each attempt."""
        return f"p{self.attempts}.{self.name}"

    @property
    def name(self) -> str:
        """Its id in vLLM, which names the tenant as a gateway does."""
        return f"r{self.index}.t{self.sender}" if self.tenant else f"r{self.index}"

    @property
    def sender(self) -> str:
        """The tenant as the schedulers know it; the first one is anonymous, as where tenants are off."""
        return f"{self.tenant:08x}" if self.tenant else ANONYMOUS_TENANT


def build_requests(trace: Iterable[TraceRequest]) -> list[SimRequest]:
    """One fresh request for each of the trace."""
    return [
        SimRequest(
            index=index,
            arrival_s=row.arrival_s,
            prompt_tokens=row.prompt_tokens,
            output_tokens=row.output_tokens,
            pieces=row.blocks,
            piece_tokens=row.block_tokens,
            tenant=row.tenant,
            conversation=row.conversation,
            think_s=row.think_s,
        )
        for index, row in enumerate(trace)
    ]


def prompt_bytes(request: SimRequest) -> bytes:
    """The prompt as the gateway reads it."""
    wanted = request.prompt_tokens * BYTES_PER_TOKEN
    if not request.pieces:
        return _repeat(pack("<q", -1 - request.index), wanted)
    piece_bytes = request.piece_tokens * BYTES_PER_TOKEN
    text = b"".join(_repeat(pack("<q", piece), piece_bytes) for piece in request.pieces)
    return text[:wanted] + _repeat(pack("<q", -1 - request.index), wanted - len(text))


def _repeat(pattern: bytes, count: int) -> bytes:
    return (pattern * (count // len(pattern) + 1))[:count] if count > 0 else b""


def block_hashes(request: SimRequest) -> Iterator[bytes]:
    """The hashes of vLLM's full blocks of the prompt and of the answer to come, in their order, without end.

    A block's hash stands for all tokens up to its end. The answer is this request's own: nothing else begins with it.
    """
    before = b""
    shared_blocks = _shared_tokens(request) // VLLM_BLOCK_TOKENS
    for number in range(shared_blocks):
        before = blake2b(before + pack("<3q", *_block_content(request, number)), digest_size=16).digest()
        yield before
    own = pack("<q", request.index)
    number = shared_blocks
    while True:
        yield own + pack("<q", number)
        number += 1


def _shared_tokens(request: SimRequest) -> int:
    return min(request.prompt_tokens, len(request.pieces) * request.piece_tokens)


def _block_content(request: SimRequest, number: int) -> tuple[int, int, int]:
    """The pieces in which a block begins and ends, and where in the first one."""
    first_token = number * VLLM_BLOCK_TOKENS
    first, offset = divmod(first_token, request.piece_tokens)
    last = (first_token + VLLM_BLOCK_TOKENS - 1) // request.piece_tokens
    return request.pieces[first], request.pieces[last], offset


def count_tokens(requests: Sequence[SimRequest]) -> tuple[int, int]:
    """Prompt and answer tokens of all."""
    return sum(row.prompt_tokens for row in requests), sum(row.output_tokens for row in requests)
