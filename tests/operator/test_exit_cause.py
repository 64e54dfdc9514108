"""Why an engine ended: texts that vLLM, PyTorch, NCCL, transformers and the hub really write, and innocent ones."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_operator.api.reasons import Reason
from moe_operator.kubernetes.exit_cause import explain_exit

MEMORY = [
    "killed by SIGKILL",
    "exit status 137: the last words",
    "exit status 1: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total"
    " capacity of"
    " 79.11 GiB of which 1.20 GiB is free.",
    "exit status 1: torch.cuda.OutOfMemoryError: HIP out of memory. Tried to allocate 20.00 MiB",
    "exit status 1: RuntimeError: CUDA out of memory occurred when warming up sampler with 256 dummy"
    " requests. Please try"
    " lowering `max_num_seqs` or `gpu_memory_utilization` when initializing the engine.",
    "exit status 1: RuntimeError: CUDA error: out of memory",
    "exit status 1: ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when"
    " initializing the engine",
    "exit status 1: ValueError: To serve at least one request with the model's max seq len (131072), (16.0"
    " GiB KV cache is"
    " needed, which is larger than the available KV cache memory (9.5 GiB).",
    "exit status 1: ValueError: Free memory on device cuda:0 (3.1/79.1 GiB) on startup is less than desired GPU memory"
    " utilization (0.9, 71.2 GiB). Decrease GPU memory utilization",
    "exit status 1: RuntimeError: [enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: can't allocate memory:"
    " you tried to allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)",
    "exit status 1: OSError: [Errno 12] Cannot allocate memory",
    "exit status 1: MemoryError",
    "exit status 1: numpy.core._exceptions._ArrayMemoryError: x; MemoryError: Unable to allocate 4 GiB",
    "exit status 1: RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "exit status 1: torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled cuda error,"
    " NCCL version 2.27.5 Last error: Cuda failure 2 'out of memory'",
    "exit status 1: RuntimeError: worker OOM while profiling",
    "exit status 1: RuntimeError: Insufficient space in /dev/shm for CPU KV offload shared region in /dev/shm: 65536"
    " MiB required, 32768 MiB free. Increase /dev/shm (e.g. --shm-size or --ipc=host).",
    "killed by SIGABRT: terminate called after throwing an instance of 'std::bad_alloc'",
    "exit status 1: RuntimeError: Engine core initialization failed. See root cause above."
    " Failed core proc(s): {'EngineCore_DP0': -9}",
]
MODEL = [
    "exit status 1: OSError: org/x is not a local folder and is not a valid model identifier listed on"
    " 'https://huggingface.co/models'",
    "exit status 1: huggingface_hub.errors.RepositoryNotFoundError: 401 Client Error. (Request ID: Root=1-6)",
    "exit status 1: huggingface_hub.errors.GatedRepoError: 403 Client Error. (Request ID: Root=1-6)",
    "exit status 1: huggingface_hub.errors.RevisionNotFoundError: 404 Client Error. (Request ID: Root=1-6)",
    "exit status 1: OSError: You are trying to access a gated repo.",
    "exit status 1: OSError: org/x does not appear to have a file named config.json. Checkout",
    "exit status 1: OSError: Can't load the configuration of 'org/x'. If you were trying to load it",
    "exit status 1: OSError: We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them",
    "exit status 1: huggingface_hub.errors.LocalEntryNotFoundError: Cannot find the requested files in the"
    " disk cache and"
    " outgoing traffic has been disabled.",
    "exit status 1: pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig: Value"
    " error, Invalid"
    " repository ID or local directory specified: '/models/x'.",
    "exit status 1: FileNotFoundError: [Errno 2] No such file or directory: '/var/lib/moeserving/models/x/params.json'",
    "exit status 1: FileNotFoundError: [Errno 2] No such file or directory: '/data/model-00001-of-2.safetensors'",
    "exit status 1: requests.exceptions.ConnectionError: HTTPSConnectionPool(host='huggingface.co',"
    " port=443): Max retries",
    "exit status 1: OSError: org/OOM-7B is not a local folder and is not a valid model identifier",
]
OTHER = [
    "exit status 1: RuntimeError: No room for the block table",
    "exit status 1: ValueError: Model architectures ['BloomForCausalLM'] failed to be inspected.",
    "exit status 1: ValueError: unknown quantization for org/ZOOM-12B",
    "exit status 1: ValueError: unsupported model OOM-7B",
    "exit status 1: AssertionError: LOOM mushrooms bloom in the room",
    "exit status 1: ValueError: gpu_memory_utilization 1.5 is above 1; to avoid running out of memory choose"
    " a lower one",
    "exit status 1: FileNotFoundError: [Errno 2] No such file or directory: 'ninja'",
    "exit status 1: FileNotFoundError: [Errno 2] No such file or directory: '/usr/local/cuda/bin/nvcc'",
    "exit status 1: torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled"
    " system error"
    " (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.5",
    "exit status 1: torch.distributed.DistNetworkError: The client socket has timed out after 600000ms while trying to"
    " connect to (tiny-engine-0.tiny-engine, 29500).",
    "exit status 1: RuntimeError: couldn't connect to the rendezvous",
    "exit status 1: zmq.error.ZMQError: Address already in use (addr='tcp://127.0.0.1:13345')",
    "exit status 1: RuntimeError: HTTP status 137 of the proxy",
    "exit status 1: RuntimeError: received signal 9 of the array",
    "exit status 2: error: unrecognized arguments: --max-len",
    "exit status 1: RuntimeError: Engine core initialization failed. See root cause above."
    " Failed core proc(s): {'EngineCore_DP0': 1}",
    "killed by SIGSEGV",
    "not ready within 900 s: Loading safetensors checkpoint shards",
    "no healthy answer for 60 s",
    "cannot listen on 0.0.0.0:8000: address already in use",
    "exit status 0",
]
ROWS = [(text, reason) for reason, texts in (
    (Reason.OUT_OF_MEMORY, MEMORY), (Reason.MODEL_NOT_FOUND, MODEL), (Reason.ENGINE_FAILING, OTHER)
) for text in texts]  # fmt: skip


@pytest.mark.parametrize(("text", "reason"), ROWS)
def test_the_cause_of_an_end_is_found_in_whole_phrases(text: str, reason: Reason) -> None:
    assert explain_exit(text).reason is reason


@given(st.text(alphabet="abcROMLomg", min_size=1, max_size=5), st.text(alphabet="abcROMLomg", max_size=5))
def test_letters_within_a_word_are_no_cause(before: str, after: str) -> None:
    assert explain_exit(f"exit status 1: ValueError: {before}OOM{after} is odd").reason is Reason.ENGINE_FAILING


@given(st.text(max_size=300))
def test_any_text_has_a_cause_and_none_raises(text: str) -> None:
    assert explain_exit(text).advice
