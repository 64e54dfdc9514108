#!/usr/bin/env bash
# orjson 3.13.0 (Python): the bytes that `dumps` returns keep the buffer that they were written to.
#
# The buffer grows by factors of two and four and is not cut to the length of the text: a text of 1,198 bytes holds 16 KiB
# by tracemalloc, one of 100 KB about 1 MB. Half of it is resident for small texts (7.8 KB for each of 20,000 texts of
# 1.2 KB), since pages that were never written are not. sys.getsizeof shows the length alone.
#
# What follows: a service that keeps JSON texts (caches, stores, queues) copies them once: bytes(memoryview(text)).
# Seen on 2026-11-30, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check orjson==3.13.0
cat >"$folder/run.py" <<'PY'
import sys
import tracemalloc
from collections.abc import Callable

import orjson


def held(make: Callable[[], bytes], count: int = 200) -> tuple[int, int, int]:
    """Length of a text, its size by `sys.getsizeof`, and the bytes that one of many kept texts holds."""
    tracemalloc.start()
    kept = [make() for _ in range(count)]
    current, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return len(kept[0]), sys.getsizeof(kept[0]), round(current / count)


for characters in (500, 1190, 20_000, 100_000):
    document = {"a": "x" * characters}
    length, size, kept = held(lambda: orjson.dumps(document))
    _, _, copied = held(lambda: bytes(memoryview(orjson.dumps(document))))
    print(f"text of {length} bytes: getsizeof {size}, held {kept}, a copy holds {copied}")
    assert kept > 5 * length and copied < 1.2 * length + 100, (length, kept, copied)
PY
"$folder/venv/bin/python" "$folder/run.py"
# Output seen:
# text of 508 bytes: getsizeof 541, held 4097, a copy holds 549
# text of 1198 bytes: getsizeof 1231, held 16265, a copy holds 1239
# text of 20008 bytes: getsizeof 20041, held 259625, a copy holds 20049
# text of 100008 bytes: getsizeof 100041, held 1038377, a copy holds 100049
