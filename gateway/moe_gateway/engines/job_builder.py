"""Makes a request's job: its prompt tokens, how many of them each target has cached, and its session's target.

Owned by the dispatcher. What targets have cached is this gateway's own record of the prompts that it sent there.
"""

from collections import OrderedDict
from collections.abc import Mapping

from moe_scheduling.engine.choice import Job
from moe_scheduling.engine.prefix_index import DEFAULT_BLOCK_BYTES, PrefixIndex, block_keys
from moe_scheduling.engine.token_ratio import MediaTokens, TokenRatio
from moe_scheduling.request.fairness import ANONYMOUS_TENANT
from moe_scheduling.signals import Target

from moe_gateway.engines.response_homes import ResponseHomes
from moe_gateway.engines.target_states import InFlightRequest
from moe_gateway.request.parsing import Parsed

REMEMBERED_SESSIONS = 100_000
# A block of the prefix index, of text in a usual language.
BLOCK_TOKENS = DEFAULT_BLOCK_BYTES // 4
# Clients name their sessions; a longer name is not remembered, so that memory has a bound.
LONGEST_SESSION = 256

_NONE_CACHED: Mapping[Target, int] = {}


class JobBuilder:
    """Sizes of prompts, the prefix index, the sessions and where responses are kept.

    Attributes:
        responses: the engine of each response.
    """

    def __init__(self) -> None:
        self._prefixes = PrefixIndex()
        self._ratios: dict[str | None, TokenRatio] = {None: TokenRatio()}
        self._media: dict[str | None, MediaTokens] = {None: MediaTokens()}
        self._sessions: OrderedDict[str, Target] = OrderedDict()
        self.responses = ResponseHomes()

    def build(self, parsed: Parsed, session: str | None, tenant: str = ANONYMOUS_TENANT) -> tuple[Job, tuple[int, ...]]:
        """The job, and the keys of its prompt's blocks for `record`; a short prompt has none."""
        prompt, tokens = parsed.prompt, self.count_tokens(parsed)
        size = parsed.prompt_bytes or len(prompt)
        session_target = None if session is None else self._sessions.get(session)
        previous = parsed.previous_response
        server = None if previous is None else self.responses.find(previous)
        if size < DEFAULT_BLOCK_BYTES:
            return Job(tokens, _NONE_CACHED, session_target, parsed.priority, tenant, parsed.model, server), ()
        keys = block_keys(prompt) if parsed.keys is None else parsed.keys
        block_tokens = tokens * DEFAULT_BLOCK_BYTES / size
        held = self._prefixes.held_blocks(keys)
        cached = {target: int(blocks * block_tokens) for target, blocks in held.items()}
        if session is parsed.user and session_target not in cached:
            # `user` may name an application: without a common prefix its requests are no conversation.
            session_target = None
        return Job(tokens, cached, session_target, parsed.priority, tenant, parsed.model, server), keys

    def count_tokens(self, parsed: Parsed) -> int:
        """The tokens of a prompt: exact where it is token ids, else by its model's learned ratio."""
        tokens = parsed.prompt_tokens
        if tokens is None:
            tokens = self._ratio(parsed.model).tokens(parsed.prompt_bytes or len(parsed.prompt))
            if parsed.media:
                tokens += self._media_tokens(parsed.model).tokens(parsed.media)
        return tokens

    def record(self, keys: tuple[int, ...], session: str | None, request: InFlightRequest) -> None:
        """A job was sent to a target, which will have its prompt cached."""
        target = request.target
        if keys:
            request.uncomputed_keys = self._prefixes.record(keys, target, request.key)
        if session is not None and len(session) <= LONGEST_SESSION:
            self._sessions[session] = target
            self._sessions.move_to_end(session)
            if len(self._sessions) > REMEMBERED_SESSIONS:
                self._sessions.popitem(last=False)

    def set_room(self, target: Target, kv_tokens: int) -> None:
        """The target has room for the KV blocks of this number of tokens; 0: it is not known."""
        self._prefixes.set_room(target, kv_tokens // BLOCK_TOKENS)

    def confirm(self, request: InFlightRequest) -> None:
        """The prompt of a request was computed."""
        self._prefixes.confirm(request.uncomputed_keys, request.target)
        request.uncomputed_keys = ()

    def discard(self, request: InFlightRequest) -> None:
        """A request has ended before its prompt was computed, as far as its answer shows."""
        self._prefixes.discard(request.uncomputed_keys, request.target, request.key)
        request.uncomputed_keys = ()

    def forget(self, target: Target) -> None:
        """The target's cache is empty, and its server has no responses."""
        self._prefixes.forget(target)
        self.responses.forget(target.server)

    def set_models(self, models: frozenset[str]) -> None:
        """The models that engines serve. Only these get a token ratio of their own: other names come from clients."""
        for model in models.difference(self._ratios):
            self._ratios[model], self._media[model] = TokenRatio(), MediaTokens()

    def learn_tokens(self, parsed: Parsed, prompt_tokens: int) -> None:
        """An engine reported how many tokens a prompt had.

        A body that continues a response is only the end of its prompt, so nothing is learned from it.
        """
        if parsed.prompt_tokens is not None or parsed.previous_response is not None:
            return
        ratio, size = self._ratio(parsed.model), parsed.prompt_bytes or len(parsed.prompt)
        if parsed.media:
            rest = prompt_tokens - ratio.tokens(size)
            self._media_tokens(parsed.model).observe(parsed.media, rest)
        else:
            ratio.observe(size, prompt_tokens)

    def _media_tokens(self, model: str | None) -> MediaTokens:
        return self._media.get(model) or self._media[None]

    def _ratio(self, model: str | None) -> TokenRatio:
        return self._ratios.get(model) or self._ratios[None]
