"""Each kernel compiles down to machine code for GPUs that vLLM serves on. Triton's compilers need no GPU.

The interpreter runs a kernel as plain Python, so it takes what the compiler refuses: a global that is no constant, a
type that does not convert. What a kernel gets here is what its launcher passes, with Triton's own rule that an argument
of 1 is a constant.
"""

import pytest
from moe_kernels.expert_load import map_and_record_kernel
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "H100": (GPUTarget("cuda", 90, 32), "cubin"),
    "MI300X": (GPUTarget("hip", "gfx942", 64), "hsaco"),
}
ONE = {"num_experts": 1, "width": 1, "top_k": 1}
TYPES = {"load": "*i32", "slots": "*i64", "replicas": "*i64", "enabled": "*i1"}

# Types other than 32-bit numbers, and constants.
CASES = {
    map_and_record_kernel: [
        (
            TYPES | {"ids": "*i32", "mapped": "*i32", "num_tokens": "*i32"},
            {"HAS_NUM_TOKENS": True, "BLOCK": 256},
        ),
        (
            TYPES | {"ids": "*i64", "mapped": "*i64", "num_tokens": "*i1"},
            {"HAS_NUM_TOKENS": False, "BLOCK": 256},
        ),
        (
            TYPES | {"ids": "*u32", "mapped": "*u32", "num_tokens": "*i32"},
            {"HAS_NUM_TOKENS": True, "BLOCK": 256} | ONE,
        ),
    ],
}


@pytest.fixture(autouse=True)
def compiled_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("gpu", TARGETS)
@pytest.mark.parametrize("kernel", CASES, ids=lambda kernel: kernel.__name__)
def test_it_compiles(kernel, gpu):
    target, machine_code = TARGETS[gpu]
    for types, constants in CASES[kernel]:
        signature = {name: types.get(name, "i32") for name in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        compiled = compile_kernel(ASTSource(fn=kernel, signature=signature, constexprs=places), target=target)
        assert compiled.asm[machine_code], (types, constants)
