"""Finds the fields of a body that few requests have, and that decide which engines may get it. Pure.

vLLM's engines act on `kv_transfer_params` and `ec_transfer_params`: they read the blocks of the address
that stands there, and a value of another type ends the engine. Both also reach it through `vllm_xargs` and
`sampling_params`. So the gateway alone sets them, and refuses a client's.

Some requests cannot be split between two engines (`split_bodies.py`): by vLLM 0.32's protocol classes and its
NixlConnector one transfer serves one sequence, whose prompt both engines read alike and whose prompt alone is computed
first.
"""

from collections.abc import Collection, Mapping
from typing import Any

from moe_gateway.http.routes import Route
from moe_gateway.request.json_body import load_json

TRANSFERS = ("kv_transfer_params", "ec_transfer_params")
_XARGS = "vllm_xargs"
# A prompt that depends on the tokens left for its answer, has no token ids, or stands in an engine's memory.
_OTHER_PROMPTS = frozenset(
    {"truncate_prompt_tokens", "prompt_embeds", "previous_response_id", "previous_input_messages"}
)
# Several sequences for one prompt, of which the first that has fetched the blocks frees them, and figures of the
# prompt's own tokens, which the second engine does not compute. With the values that ask for neither.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "use_beam_search": (None, False),
    "echo": (None, False),
    "prompt_logprobs": (None,),
}
# Tools that have to be called, which an answer of one token does not have.
_FREE_TOOLS = (None, "auto", "none")
# Of responses alone: what one engine keeps, or does in several turns.
_OF_RESPONSES = frozenset({"background", "request_id", "truncation", "tools"})

UNUSUAL = frozenset({*TRANSFERS, _XARGS, "sampling_params", "tool_choice", *_OTHER_PROMPTS, *_NEUTRAL, *_OF_RESPONSES})


def find_transfer_field(document: Mapping[str, Any]) -> str | None:
    """Returns the path of a field by which a client would steer a transfer between engines; None without one."""
    sampling = document.get("sampling_params")
    places: dict[str, object] = {
        "": document,
        f"{_XARGS}.": document.get(_XARGS),
        "sampling_params.extra_args.": sampling.get("extra_args") if isinstance(sampling, dict) else None,
    }
    for path, fields in places.items():
        for name in TRANSFERS:
            if isinstance(fields, Mapping) and fields.get(name) is not None:
                return path + name
    return None


def find_form_transfer_field(values: Mapping[str, str]) -> str | None:
    """Returns the same for the fields of a form, in which `vllm_xargs` is JSON; that field itself where it is none."""
    if (name := next((name for name in TRANSFERS if name in values), None)) is not None or _XARGS not in values:
        return name
    try:
        return find_transfer_field({_XARGS: load_json(values[_XARGS].encode("utf-8", "surrogatepass"))})
    except ValueError:
        # Of a long one only the beginning is known here.
        return _XARGS


def stays_whole(route: Route, document: Mapping[str, Any]) -> bool:
    """Returns whether fields of a body, other than its prompt, keep it from being split between two engines."""
    if any(document.get(name) is not None for name in _OTHER_PROMPTS):
        return True
    if any(document.get(name) not in values for name, values in _NEUTRAL.items()):
        return True
    if not _chooses_freely(document.get("tool_choice")):
        return True
    return route is Route.RESPONSES and _is_kept_or_in_turns(document)


def _chooses_freely(tool_choice: object) -> bool:
    kind = tool_choice.get("type") if isinstance(tool_choice, dict) else tool_choice
    return kind in _FREE_TOOLS


def _is_kept_or_in_turns(document: Mapping[str, Any]) -> bool:
    if document.get("background") or document.get("request_id") is not None:
        return True
    if document.get("truncation") not in (None, "disabled"):
        return True
    tools = document.get("tools")
    functions: Collection[object] = tools if isinstance(tools, list) else ()
    return any(not isinstance(tool, dict) or tool.get("type") != "function" for tool in functions)
