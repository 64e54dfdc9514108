"""First process of a node: it holds the node's namespaces and reaps orphans.

Run as a program by cluster_node. When it ends, by SIGTERM or otherwise, the kernel ends every process of the node
and takes its mounts, links and packet rules with them.
"""

import os
import signal

AWAITED = {signal.SIGCHLD, signal.SIGTERM}


def main() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, AWAITED)
    while signal.sigwait(AWAITED) != signal.SIGTERM:
        reap()


def reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue
    except ChildProcessError:
        return


if __name__ == "__main__":
    main()
