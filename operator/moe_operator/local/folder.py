"""The folder of one deployment: its files, the holder of its lock, and files that change as a whole.

`lock` is held by the supervisor for its whole life (`up` takes it and hands it on), so at most one runs for a name. It
is never deleted: a second file of that name would be a second lock.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moe_operator.local.failure import Failure

STATE_FILE = "state.json"
PAGE_FILE = "live-page.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """`root` is the state folder that all deployments share; `name` the deployment's."""

    root: Path
    name: str

    @property
    def path(self) -> Path:
        """Folder of this deployment in the state directory."""
        return self.root / self.name

    @property
    def state(self) -> Path:
        """What runs; there while a supervisor lives, and after one that was killed."""
        return self.path / STATE_FILE

    @property
    def resource(self) -> Path:
        """File of the resource that is in force."""
        return self.path / "moeserving.yaml"

    @property
    def token(self) -> Path:
        """The control token, readable by its owner alone."""
        return self.path / "token"

    @property
    def page(self) -> Path:
        """File that leads a browser to the live page; it has the page's key, so its owner alone can read it."""
        return self.path / PAGE_FILE

    @property
    def lock(self) -> Path:
        """File whose lock the supervisor holds."""
        return self.path / "lock"

    @property
    def change_lock(self) -> Path:
        """Held while the settings change."""
        return self.path / "change.lock"

    def config(self, process: str) -> Path:
        """Configuration file of a process."""
        return self.path / f"{process}.json"

    def log(self, process: str) -> Path:
        """Output of a process. The engine's is written by its agent, into the folder that the plan gives it."""
        if process.startswith("engine-"):
            return self.path / f"{self.name}-{process}" / "engine.log"
        return self.path / f"{process}.log"

    def make(self) -> None:
        """Makes the folder; others cannot look into it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not os.access(self.path, os.W_OK | os.X_OK):
                raise PermissionError(0, "permission denied")
        except OSError as error:
            raise Failure(f"cannot make {self.path}: {(error.strerror or str(error)).lower()}") from None


def default_state_dir() -> Path:
    """`$XDG_STATE_HOME/moeserving`; the variable counts only when it is absolute, as its specification wants."""
    named = os.environ.get("XDG_STATE_HOME", "")
    base = Path(named) if named.startswith("/") else Path.home() / ".local" / "state"
    return base / "moeserving"


def known_names(root: Path, *, stopped: bool = False) -> list[str]:
    """Names of the deployments that have a state; with `stopped` also of those of which only logs are left."""
    sign = "lock" if stopped else STATE_FILE
    return sorted(path.parent.name for path in root.glob(f"*/{sign}")) if root.is_dir() else []


def write_whole(path: Path, text: str, mode: int = 0o600) -> None:
    """Replaces a file in one step: a reader sees the old text or the new."""
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def take_lock(path: Path) -> int | None:
    """A descriptor that holds the lock until it is closed everywhere; None when another holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Holds a lock for a block; waits while another process holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
