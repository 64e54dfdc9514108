"""A plan for experts from files: a recorded load (npz) and a placement (JSON), for a group that need not run anywhere.

Whatever a file holds is read or refused with its path; nothing in it is run: pickled arrays are refused.
"""

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from moe_contract.input_errors import InputError, InvalidInput
from moe_scheduling.expert.decision import ExpertCosts, ExpertLoad, ExpertSettings, Placement, initial_placement
from moe_scheduling.expert.placement import Floats, check_experts

LOAD_KEY = "load"
PLACEMENT_KEY = "physical_to_logical"

# A file says nothing of the machine. These are those of DeepSeek-V3 (hidden size 7168, experts of 3 * 7168 * 2048
# weights, a byte each) on H100s by their data sheets: 88 MFLOP a token at 400 TFLOP/s; a token's 7 kB there and 14 kB
# back over NVLink (450 GB/s) or a 400 Gbit/s network card; an expert's 44 MB over that card, with as much again for
# laying it in place. An engine that runs measures its own: `moeserving experts plan NAME`.
ASSUMED_COSTS = ExpertCosts(
    token_s=2.2e-7,
    remote_token_s=2.4e-8,
    internode_token_s=2.1e-7,
    move_s=2e-3,
    horizon_steps=ExpertSettings().interval_steps,
)


def read_load_file(path: Path) -> ExpertLoad:
    """The array `load[source, layer, expert]` of an npz file, in tokens a step.

    Raises:
        InvalidInput: it cannot be read, is no npz file, or its array is missing or no load.
    """
    array = _read_array(path)
    if array.dtype.kind not in "iuf":
        raise _refused(path, f"{LOAD_KEY} must be numbers, not {array.dtype}")
    if array.ndim != 3 or not array.size:
        shape = "x".join(str(length) for length in array.shape) or "a single number"
        raise _refused(path, f"{LOAD_KEY} must be [source, layer, expert] and not empty; it is {shape}")
    values: Floats = array.astype(np.float64)
    for wrong, word in ((~np.isfinite(values), "finite"), (values < 0, "not negative")):
        if wrong.any():
            source, layer, expert = np.argwhere(wrong)[0]
            found = values[source, layer, expert]
            raise _refused(path, f"{LOAD_KEY}[{source}, {layer}, {expert}] must be {word}; it is {found}")
    return ExpertLoad(tokens=values)


def _read_array(path: Path) -> Floats:
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise _refused(path, "is a single array; an npz file is needed (numpy.savez)")
            if LOAD_KEY not in archive.files:
                known = ", ".join(sorted(archive.files)) or "none"
                raise _refused(path, f"has no array {LOAD_KEY!r}; it has: {known}")
            array = archive[LOAD_KEY]
    except InvalidInput:
        raise
    except MemoryError:
        raise _refused(path, f"{LOAD_KEY} is larger than the memory of this machine") from None
    except _DAMAGE as error:
        raise _refused(path, _damage(error)) from None
    if not isinstance(array, np.ndarray):
        raise _refused(path, f"{LOAD_KEY} is no array")
    return array


# What NumPy and the zip library raise on files that are none of theirs.
# Counts of redundant experts that an error names.
_NAMED_COUNTS = 3
_DAMAGE = (
    OSError, ValueError, EOFError, KeyError, NotImplementedError, RuntimeError, TypeError, SyntaxError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def _damage(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror.lower()}"
    if "Object arrays" in str(error):
        return "holds pickled objects, which are not read; save plain numbers"
    # NumPy takes any unknown format for pickled data.
    if "pickle" in str(error):
        return "is no npz file; pickled data is not read"
    return "is no npz file, or a damaged one"


def find_placement(current: Path | None, load: ExpertLoad, *, ranks: int, nodes: int, redundant: int) -> Placement:
    """The present placement: that of a file, else vLLM's at the start.

    Raises:
        InvalidInput: the group cannot have experts, ranks and nodes in these numbers, or the file does not fit it.
    """
    slots = load.experts + redundant
    if slots % ranks:
        fitting = ", ".join(str(-load.experts % ranks + count * ranks) for count in range(_NAMED_COUNTS))
        message = f"{load.experts} experts and {redundant} redundant ones do not divide evenly by {ranks} ranks"
        message += f"; {fitting}, ... redundant ones do"
        raise InvalidInput([InputError("--redundant", message)])
    if ranks % nodes:
        raise InvalidInput([InputError("--nodes", f"{ranks} ranks do not divide evenly by {nodes} nodes")])
    if ranks % len(load.tokens):
        message = f"the load's {len(load.tokens)} sources do not divide {ranks} ranks evenly"
        raise InvalidInput([InputError("--ranks", message)])
    if current is None:
        return initial_placement(
            layers=load.layers, experts=load.experts, redundant=redundant, ranks=ranks, nodes=nodes
        )
    table = _read_table(current, (load.layers, slots))
    placement = Placement(physical_to_logical=table, ranks=ranks, nodes=nodes)
    try:
        check_experts(placement, layers=load.layers, experts=load.experts)
    except ValueError as error:
        raise _refused(current, f"{PLACEMENT_KEY}: {error}") from None
    return placement


def _read_table(path: Path, shape: tuple[int, int]) -> Any:
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise _refused(path, f"cannot be read: {(error.strerror or str(error)).lower()}") from None
    except (ValueError, RecursionError):
        raise _refused(path, "is not JSON") from None
    rows = document.get(PLACEMENT_KEY) if isinstance(document, dict) else None
    if not isinstance(rows, list):
        raise _refused(path, f"has no {PLACEMENT_KEY}, a list of layers; `moeserving experts plan --json` writes it")
    lengths = {len(row) if isinstance(row, list) else 0 for row in rows}
    if len(rows) != shape[0] or lengths != {shape[1]}:
        found = f"{len(rows)} layers of {' or '.join(str(length) for length in sorted(lengths)) or 'no'} slots"
        raise _refused(path, f"{PLACEMENT_KEY} must be {shape[0]} layers of {shape[1]} slots; it is {found}")
    for layer, row in enumerate(rows):
        for slot, expert in enumerate(row):
            if type(expert) is not int or not 0 <= expert < 2**31:
                raise _refused(path, f"{PLACEMENT_KEY}[{layer}][{slot}] must be an expert's number, not {expert!r:.40}")
    return np.array(rows, dtype=np.int64)


def _refused(path: Path, message: str) -> InvalidInput:
    return InvalidInput([InputError(str(path), message)])
