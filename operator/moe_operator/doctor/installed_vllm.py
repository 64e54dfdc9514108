"""The vLLM of this machine, which the node agent describes through an entry point, so that nothing here imports it."""

from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, entry_points

GROUP, VLLM = "moeserving.machine_checks", "vllm"


def find_describe(found: Iterable[EntryPoint] | None = None) -> Callable[[], str] | None:
    """Returns a function that names the installed vLLM or raises `InvalidInput`; None where the agent is missing.

    Args:
        found: entry points among which it is looked for; None: those of this installation.
    """
    for entry in entry_points(group=GROUP) if found is None else found:
        if entry.name == VLLM:
            try:
                describe: Callable[[], str] = entry.load()
            except ModuleNotFoundError:
                return None
            return describe
    return None
