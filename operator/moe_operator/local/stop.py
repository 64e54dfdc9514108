"""Stops a deployment. Called by `moeserving down` and by `up` when it is interrupted."""

import os
import time
from collections.abc import Callable
from contextlib import suppress

import psutil

from moe_operator.local.failure import Failure
from moe_operator.local.folder import Folder, take_lock
from moe_operator.local.record import Alive, find_process, load_record
from moe_operator.local.start import clean

_LOOK_EVERY_S = 0.1


def request_stop(supervisor: Alive | None) -> None:
    """Asks the supervisor to drain; asked again, it stops at once."""
    if (process := find_process(supervisor)) is not None:
        with suppress(psutil.NoSuchProcess):
            process.terminate()


def wait_stopped(supervisor: Alive | None, on_look: Callable[[], None] = lambda: None) -> None:
    """Until the supervisor has ended, which bounds the time itself; `on_look` is called now and then."""
    while find_process(supervisor) is not None:
        on_look()
        time.sleep(_LOOK_EVERY_S)


def stop_leftovers(folder: Folder) -> bool:
    """Ends what a killed supervisor left; whether there was anything to clean.

    Raises:
        Failure: another command has the deployment in hand.
    """
    if load_record(folder) is None:
        return False
    lock = take_lock(folder.lock)
    if lock is None:
        raise Failure(f"{folder.name}: is being started or stopped by another command")
    try:
        clean(folder)
    finally:
        os.close(lock)
    return True
