"""Compiles the hot modules of the gateway with mypyc: `compile_gateway.py [SITE]`, from the root of the repository.

`make compile-gateway` puts the compiled modules beside their sources, an image's build into the packages of SITE.
Python takes a compiled module before its source, so nothing else changes; they are made for one version of Python.
Figures and limits are in docs/adr/0028.
"""

import shutil
import sys
from pathlib import Path

from mypyc.build import mypycify
from setuptools import Distribution
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parents[1]
ROOTS = {"moe_gateway": "gateway", "moe_scheduling": "scheduling"}
# What each request and each event passes. Left out: modules whose dataclasses have fields that the core declares
# (`choice.py`) and subclasses of tuples (`target_list.py`), which mypyc does not take.
ENGINE = ("attempts", "prefix_index", "target_state", "token_ratio", "ttft_calibration")
GATEWAY = {
    "": ("recent", "request_stats"),
    "engines/": ("dispatcher", "fleet", "hold_queue", "job_builder", "target_states"),
    "http/": ("client", "heads", "rare_headers", "request_reader", "upstream", "whole_request"),
    "request/": (
        *("answer_account", "answer_beginning", "client_answer", "continued_exchange", "event_pieces"),
        *("exchange", "open_users", "parsing", "reading", "recent_requests", "split_exchange", "stream_events"),
    ),
}
MODULES = (
    *(f"scheduling/moe_scheduling/engine/{name}.py" for name in ENGINE),
    *(f"gateway/moe_gateway/{folder}{name}.py" for folder, names in GATEWAY.items() for name in names),
)


def compile_modules(build: Path) -> list[Path]:
    """Compiles the modules below `build` and returns the libraries.

    Raises:
        SystemExit: a module cannot be compiled; mypy has printed why.
    """
    extensions = mypycify(
        ["--config-file", "pyproject.toml", *MODULES], opt_level="2", separate=True, target_dir=str(build)
    )
    command = build_ext(Distribution({"name": "moeserving-gateway", "ext_modules": extensions}))
    command.build_lib, command.build_temp = str(build / "lib"), str(build / "tmp")
    command.parallel = True
    command.ensure_finalized()
    command.run()
    return sorted((build / "lib").rglob("*.so"))


def main(site: Path | None) -> None:
    """Compiles everything and puts it in its place."""
    build = ROOT / "build" / "compiled"
    shutil.rmtree(build, ignore_errors=True)
    for library in compile_modules(build):
        within = library.relative_to(build / "lib")
        target = (site or ROOT / ROOTS[within.parts[0]]) / within
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(library, target)
    print(f"compiled {len(MODULES)} modules")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else None)
