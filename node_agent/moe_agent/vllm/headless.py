"""vLLM on a node of a replica that has no server: `python -m moe_agent.vllm.headless ARGUMENTS`, run by the supervisor.

What `vllm serve --headless` does. vLLM's own command asks for the metadata of a distribution `vllm`, which its CPU
build does not have; its server's module ignores `--headless`.
"""

from vllm.entrypoints.cli.serve import run_headless
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.logger import configure_logging_from_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

from moe_agent.vllm.leader_address import wait_for_address


def main() -> None:
    """Runs this node's part of the engine until it ends or SIGTERM comes."""
    cli_env_setup()  # type: ignore[no-untyped-call]
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
