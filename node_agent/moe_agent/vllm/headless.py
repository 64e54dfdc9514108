"""vLLM on a node of a replica that has no server: `python -m moe_agent.vllm.headless ARGUMENTS`, run by the supervisor.

What `vllm serve --headless` does. vLLM's own command asks for the metadata of a distribution `vllm`, which its CPU
build does not have; its server's module ignores `--headless`.
"""

from collections.abc import Callable
from importlib import import_module

# vLLM's command has these names in either supported version; the module that defines the latter two moved.
from vllm.entrypoints.cli.serve import (  # type: ignore[attr-defined]
    make_arg_parser,
    run_headless,
    validate_parsed_serve_args,
)
from vllm.logger import configure_logging_from_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

from moe_agent.vllm.leader_address import wait_for_address
from moe_agent.vllm.version import UnsupportedVersion, find_version

# Where `cli_env_setup` is in vLLM 0.33, and in 0.32.
_STARTUP_MODULES = ("vllm.entrypoints.common.startup", "vllm.entrypoints.serve.utils.api_utils")


def find_environment_setup() -> Callable[[], None]:
    """Returns vLLM's function that sets up the environment of its command.

    Raises:
        UnsupportedVersion: the installed vLLM has it in none of the known modules.
    """
    for name in _STARTUP_MODULES:
        try:
            setup: Callable[[], None] = import_module(name).cli_env_setup
        except (ModuleNotFoundError, AttributeError):
            continue
        return setup
    raise UnsupportedVersion(f"vLLM {find_version()} has cli_env_setup in none of {', '.join(_STARTUP_MODULES)}")


def main() -> None:
    """Runs this node's part of the engine until it ends or SIGTERM comes."""
    find_environment_setup()()
    parser = make_arg_parser(FlexibleArgumentParser())  # type: ignore[no-untyped-call]
    arguments = parser.parse_args()
    configure_logging_from_args(arguments)
    validate_parsed_serve_args(arguments)
    arguments.headless, arguments.api_server_count = True, 0
    if arguments.data_parallel_address is not None:
        arguments.data_parallel_address = wait_for_address(arguments.data_parallel_address)
    arguments.master_addr = wait_for_address(arguments.master_addr)
    run_headless(arguments)


if __name__ == "__main__":
    main()
