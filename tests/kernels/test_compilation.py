"""Each kernel compiles down to machine code for GPUs that vLLM serves on. Triton's compilers need no GPU.

The interpreter runs a kernel as plain Python, so it takes what the compiler refuses: a global that is no constant, a
type that does not convert. What a kernel gets here is what its launcher passes, with Triton's own rule that an argument
of 1 is a constant.
"""

import pytest
from moe_kernels.co_activation import pair_kernel
from moe_kernels.expert_load import count_kernel
from moe_kernels.packed_experts import copy_kernel
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "H100": (GPUTarget("cuda", 90, 32), "cubin"),
    "MI300X": (GPUTarget("hip", "gfx942", 64), "hsaco"),
}
COUNT = {"TOP_K": 8, "BY_SOURCE": True, "BLOCK": 1024}
PAIR = {"TOP_K": 8, "NEXT_TOP_K": 6, "BLOCK": 1024}
COPY = {"GATHER": True, "BLOCK": 1024}
IDS_OF_ONE = {"layer_stride": 1, "token_stride": 1, "slot_stride": 1, "num_experts": 1, "TOP_K": 1}
SOURCE_OF_ONE = {"source_stride": 1, "num_sources": 1, "num_layers": 1}
NEXT_OF_ONE = {"next_layer_stride": 1, "next_token_stride": 1, "next_slot_stride": 1, "num_next": 1, "NEXT_TOP_K": 1}
ROW_OF_ONE = {"row_words": 1, "row_stride": 1, "part_stride": 1, "row_blocks": 1}

# Types of what is not a 32-bit number, and constants.
CASES = {
    count_kernel: [
        ({"load": "*i32", "ids": "*i32", "sources": "*i32"}, COUNT | {"BY_SOURCE": False}),
        ({"load": "*i64", "ids": "*i64", "sources": "*i32"}, COUNT),
        ({"load": "*i32", "ids": "*u32", "sources": "*i64"}, COUNT),
        ({"load": "*i32", "ids": "*u8", "sources": "*i8"}, COUNT | IDS_OF_ONE | SOURCE_OF_ONE),
    ],
    pair_kernel: [
        ({"pairs": "*i32", "ids": "*i32", "next_ids": "*i32"}, PAIR),
        ({"pairs": "*i64", "ids": "*i64", "next_ids": "*u32"}, PAIR),
        ({"pairs": "*i32", "ids": "*u8", "next_ids": "*i16"}, PAIR | IDS_OF_ONE | NEXT_OF_ONE),
    ],
    copy_kernel: [
        ({"rows": "*i64", "part": "*i64", "chosen": "*i64"}, COPY),
        ({"rows": "*i32", "part": "*i32", "chosen": "*i64"}, COPY | {"GATHER": False}),
        ({"rows": "*i16", "part": "*i16", "chosen": "*i64"}, COPY | ROW_OF_ONE),
        ({"rows": "*u8", "part": "*u8", "chosen": "*i64"}, COPY | ROW_OF_ONE | {"GATHER": False}),
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
