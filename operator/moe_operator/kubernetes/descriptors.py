"""File descriptors of the operator's process: each stream of states takes one."""

import logging
import resource

# Of other files and connections: the API server, metrics, one call of each worker.
RESERVED = 256

log = logging.getLogger("moeserving.operator")


def most_streams() -> int:
    """Raises the process's soft limit to its hard limit, if it may; returns how many streams fit beside the rest."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = hard
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (ValueError, OSError) as error:
            log.warning("the limit of open files stays at %d: %s", soft, error)
            limit = soft
    return 1_000_000 if limit == resource.RLIM_INFINITY else max(0, limit - RESERVED)
