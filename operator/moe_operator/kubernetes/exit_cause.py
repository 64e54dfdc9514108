"""The cause of an engine's end, from the one line that its agent reports. Pure.

The line begins with how the process ended (`killed by SIGKILL`, `exit status 1: ValueError: ...`). Causes are found by
whole phrases of vLLM, PyTorch, transformers and the Hugging Face hub: a word within a model's name is none, nor is
advice against running out of memory. What is not known is `EngineFailing`, with the line in full.
"""

import re
from dataclasses import dataclass

from moe_contract.engine_process import NO_CONNECTOR

from moe_operator.api.reasons import Reason

_MEMORY = re.compile(
    r"(?<!\brun )(?<!\brunning )(?<!\bruns )\b[Oo]ut of memory\b|\bOutOfMemoryError\b|(?<![\w/.-])OOM(?![\w/-])"
    r"|\bOOM-?[Kk]illed\b|\bMemoryError\b|\bstd::bad_alloc\b|\b[Cc]an(?:no|')t allocate memory\b"
    r"|\bCUBLAS_STATUS_ALLOC_FAILED\b|\bNo available memory for the cache blocks\b"
    r"|\blarger than the available KV cache memory\b|\bFree memory on device\b.*\bis less than\b"
)
# vLLM's check before it lays out the tier of offloaded KV blocks, or its ranks' queues.
_SHARED_MEMORY = re.compile(r"\bInsufficient space in /dev/shm for\b")
# By the process's exit: of vLLM's own server, or of a core process that the server reports.
_KILLED = re.compile(
    r"^(?:killed by SIGKILL|ended by signal 9|exit status 137)\b|\bFailed core proc\(s\): \{[^}]*: -9\b"
)
# By the agent, whose watch of the ranks ended the engine.
_RANK = re.compile(r"^rank \d+: ")
_MODEL_MISSING = re.compile(
    r"\bis not a valid model identifier\b|\bis not a valid git identifier\b"
    r"|\b(?:Repository|Revision|(?:Local|Remote)?Entry)NotFoundError\b|\bRepository Not Found\b|\bGatedRepoError\b"
    r"|\baccess a gated repo\b"
    r"|\b40[134] Client Error\b|\bdoes not appear to have a file named\b|\bCan't load the configuration\b"
    r"|\bInvalid repository ID\b|\bHFValidationError\b|\b[Ww]e couldn't connect to '|\bfind the requested files\b"
    r"|host='huggingface\.co'"
    r"|\bNo such file or directory: '(?:/var/lib/moeserving/models\b"
    r"|[^']*(?:config\.json|tokenizer|\.safetensors|\.gguf))"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitCause:
    """Why an engine ended.

    Attributes:
        reason: in one word, for the condition.
        advice: the problem and its remedy.
    """

    reason: Reason
    advice: str


_OUT_OF_MEMORY = ExitCause(
    reason=Reason.OUT_OF_MEMORY,
    advice="the engine ran out of memory; lower --max-model-len or spec.engine.resources.kvCacheMemory",
)
_NO_SHARED_MEMORY = ExitCause(
    reason=Reason.OUT_OF_MEMORY,
    advice="/dev/shm is too small; lower spec.engine.kvOffload.cpu or raise spec.engine.resources.sharedMemory; on one "
    "machine mount /dev/shm with a greater size",
)
_WAS_KILLED = ExitCause(
    reason=Reason.OUT_OF_MEMORY, advice="the engine was killed, as when memory runs out; raise the limit"
)
_NO_MODEL = ExitCause(
    reason=Reason.MODEL_NOT_FOUND,
    advice="the model cannot be loaded; check spec.model.uri, its revision and spec.model.tokenSecret",
)
_NO_CONNECTOR = ExitCause(
    reason=Reason.CONNECTOR_MISSING,
    advice="the image lacks what KV transfer needs; use one that has it, or set spec.engine.roles.mode to unified",
)
_RANK_FAILED = ExitCause(
    reason=Reason.RANK_FAILED,
    advice="a rank of the engine failed, as when memory runs out, and the engine starts anew; see the pod's log",
)
_UNKNOWN = ExitCause(reason=Reason.ENGINE_FAILING, advice="vLLM ends before it is ready; see the pod's log")


def explain_exit(last_exit: str) -> ExitCause:
    """Returns the cause of an end that is described so."""
    if last_exit.startswith(NO_CONNECTOR):
        return _NO_CONNECTOR
    if _RANK.match(last_exit) and not (_MEMORY.search(last_exit) or _SHARED_MEMORY.search(last_exit)):
        return _RANK_FAILED
    causes = (
        (_KILLED, _WAS_KILLED),
        (_MODEL_MISSING, _NO_MODEL),
        (_SHARED_MEMORY, _NO_SHARED_MEMORY),
        (_MEMORY, _OUT_OF_MEMORY),
    )
    for pattern, cause in causes:
        if pattern.search(last_exit):
            return cause
    return _UNKNOWN
