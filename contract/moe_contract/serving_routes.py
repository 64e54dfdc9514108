"""Which routes of an engine's HTTP server are served to users, which only its port knows, and which are closed.

Read by the gateway, which knows the served ones alone, and by the middleware of the engines, which closes all others at
their own port. Paths are spelt as in vLLM's OpenAPI document. A test walks the routes of the installed vLLM: each
stands in exactly one of the three lists.
"""

import re
from collections.abc import Iterable
from enum import Enum


class RouteWork(Enum):
    """What an engine does for a request: nothing on the accelerator, computing its prompt, or generating tokens too."""

    NONE = "none"
    READ = "read"
    GENERATE = "generate"


class Route(Enum):
    """A route that is served to users: path, method and work."""

    CHAT = ("/v1/chat/completions", "POST", RouteWork.GENERATE)
    CHAT_BATCH = ("/v1/chat/completions/batch", "POST", RouteWork.GENERATE)
    COMPLETIONS = ("/v1/completions", "POST", RouteWork.GENERATE)
    RESPONSES = ("/v1/responses", "POST", RouteWork.GENERATE)
    RESPONSE = ("/v1/responses/{response_id}", "GET", RouteWork.NONE)
    RESPONSE_CANCEL = ("/v1/responses/{response_id}/cancel", "POST", RouteWork.NONE)
    MESSAGES = ("/v1/messages", "POST", RouteWork.GENERATE)
    COUNT_TOKENS = ("/v1/messages/count_tokens", "POST", RouteWork.NONE)
    TRANSCRIPTIONS = ("/v1/audio/transcriptions", "POST", RouteWork.GENERATE)
    TRANSLATIONS = ("/v1/audio/translations", "POST", RouteWork.GENERATE)
    DECISIONS = ("/v1/systemone", "POST", RouteWork.GENERATE)
    GENERATE = ("/inference/v1/generate", "POST", RouteWork.GENERATE)
    EMBEDDINGS = ("/v1/embeddings", "POST", RouteWork.READ)
    EMBED_V2 = ("/v2/embed", "POST", RouteWork.READ)
    POOLING = ("/pooling", "POST", RouteWork.READ)
    CLASSIFY = ("/classify", "POST", RouteWork.READ)
    SCORE = ("/score", "POST", RouteWork.READ)
    SCORE_V1 = ("/v1/score", "POST", RouteWork.READ)
    RERANK = ("/rerank", "POST", RouteWork.READ)
    RERANK_V1 = ("/v1/rerank", "POST", RouteWork.READ)
    RERANK_V2 = ("/v2/rerank", "POST", RouteWork.READ)
    GENERATIVE_SCORING = ("/generative_scoring", "POST", RouteWork.READ)
    CHAT_RENDER = ("/v1/chat/completions/render", "POST", RouteWork.NONE)
    COMPLETIONS_RENDER = ("/v1/completions/render", "POST", RouteWork.NONE)
    RESPONSES_RENDER = ("/v1/responses/render", "POST", RouteWork.NONE)
    MESSAGES_RENDER = ("/v1/messages/render", "POST", RouteWork.NONE)
    CHAT_DERENDER = ("/v1/chat/completions/derender", "POST", RouteWork.NONE)
    COMPLETIONS_DERENDER = ("/v1/completions/derender", "POST", RouteWork.NONE)
    TOKENIZE = ("/tokenize", "POST", RouteWork.NONE)
    DETOKENIZE = ("/detokenize", "POST", RouteWork.NONE)
    TOKENIZER_INFO = ("/tokenizer_info", "GET", RouteWork.NONE)
    MODELS = ("/v1/models", "GET", RouteWork.NONE)
    # The gateway answers it from the engines' lists; vLLM has no such route.
    MODEL = ("/v1/models/{model}", "GET", RouteWork.NONE)
    HEALTH = ("/health", "GET", RouteWork.NONE)

    def __init__(self, path: str, method: str, work: RouteWork) -> None:
        self.path = path.encode()
        self.method = method.encode()
        self.label = self.name.lower()
        # Whether an engine computes for it, so that its size and its first token count.
        self.has_job = work is not RouteWork.NONE
        # Whether its answer in one piece comes once the prompt is computed, as the first token of a stream does.
        self.only_reads = work is RouteWork.READ
        # Whether its answer can be a stream; vLLM ignores the field `stream` of the other routes.
        self.may_stream = work is RouteWork.GENERATE and path not in ("/v1/chat/completions/batch", "/v1/systemone")
        # Whether errors and streams have the shape of Anthropic's API; all others have that of OpenAI's.
        self.is_anthropic = path.startswith("/v1/messages")
        # Whether its body is a form with a file instead of a JSON object.
        self.is_form = path.startswith("/v1/audio/")
        # Whether it is about one response, which one engine keeps.
        self.names_response = "{response_id}" in path


# Answered by the agent's own middleware in the engine, once the engine's core answers.
CORE = "/core"
# Routes for the agent and for monitoring: they pass at an engine's port, and the gateway does not know them.
ENGINE_ONLY = frozenset({"/load", "/metrics", "/ping", "/version", "/is_sleeping", "/is_paused", CORE})

_STEERS = "changes or stops the engine"
_REVEALS = "tells about the server, not about a model"
_SAGEMAKER = "a name of SageMaker for routes that are served under their own names"
# Routes of vLLM that are closed on purpose, and why.
CLOSED = {
    **dict.fromkeys(
        ("/pause", "/resume", "/sleep", "/wake_up", "/release_kv_cache_memory", "/collective_rpc"), _STEERS
    ),
    **dict.fromkeys(("/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"), _STEERS),
    **dict.fromkeys(("/scale_elastic_ep", "/is_scaling_elastic_ep", "/fault_tolerance/apply"), _STEERS),
    **dict.fromkeys(("/init_weight_transfer_engine", "/shutdown_weight_transfer_engine"), _STEERS),
    **dict.fromkeys(("/start_weight_update", "/start_draft_weight_update", "/finish_weight_update"), _STEERS),
    **dict.fromkeys(("/update_weights", "/update_weight_version", "/weight_checker"), _STEERS),
    **dict.fromkeys(("/start_profile", "/stop_profile"), _STEERS),
    **dict.fromkeys(("/v1/load_lora_adapter", "/v1/unload_lora_adapter"), "loads files that the caller names"),
    **dict.fromkeys(("/adapters", "/adapters/{adapter_name}"), "loads files that the caller names"),
    **dict.fromkeys(("/abort_requests", "/inference/v1/abort_requests"), "ends requests of other users"),
    **dict.fromkeys(("/server_info", "/weight_info", "/get_world_size", "/kv_event_sources"), _REVEALS),
    **dict.fromkeys(("/fault_tolerance/status", "/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"), _REVEALS),
    "/static": _REVEALS,
    "/invocations": _SAGEMAKER,
    "/v1/realtime": "a WebSocket, which the gateway does not speak",
    "/cohere/v2/chat": "vLLM has it only where Cohere's own client library is installed; `/v1/chat/completions` serves",
    "/cohere/v2/chat/render": "vLLM has it only where Cohere's own client library is installed",
}


def compile_templates(paths: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches, as a whole, each path that fits one of these templates; an id has no slash."""
    templates = sorted(path for path in paths if "{" in path)
    return re.compile("|".join(re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(template)) for template in templates))
