"""File descriptors of the operator's process: each stream of states takes one."""

import resource

# Of other files and connections: the API server, metrics, one call of each worker.
RESERVED = 256


def most_streams() -> int:
    """Raises the process's soft limit to its hard limit; returns how many streams fit beside everything else."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return 1_000_000 if hard == resource.RLIM_INFINITY else max(0, hard - RESERVED)
