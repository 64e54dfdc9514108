"""Fixtures: vLLM's real scheduler without a model, in virtual time, and the settings it reads."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from moe_agent.shared_memory.control_record import Control, ControlRecordWriter
from moe_contract.engine_process import RUN_DIR_VARIABLE
from moe_scheduling.request.order import RequestPolicy, RequestSettings
from moe_tools.virtual_engine import EngineShape, VirtualEngine, VirtualEngineFactory


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whichever test comes first pays for loading vLLM, which takes minutes on a busy machine."""
    for item in items:
        if "virtual_engines" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(600))


@pytest.fixture(scope="session")
def virtual_engines(tmp_path_factory: pytest.TempPathFactory) -> VirtualEngineFactory:
    return VirtualEngineFactory(tmp_path_factory.mktemp("model"))


@pytest.fixture
def make_engine(virtual_engines: VirtualEngineFactory) -> Iterator[Callable[..., VirtualEngine]]:
    """Makes a virtual engine with our scheduler, which publishes at every step, or with vLLM's own (`stock=True`)."""
    made = []

    def make(*, stock: bool = False, **shape: Any) -> VirtualEngine:
        made.append(virtual_engines.make(EngineShape(**shape), stock=stock))
        made[-1].scheduler.publish_interval_s = 0.0
        return made[-1]

    yield make
    for engine in made:
        engine.scheduler.shutdown()


class Settings:
    """The agent's side: puts settings in force for schedulers made after it."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._version = 1
        self._writer = ControlRecordWriter(run_dir, Control(version=1, request=RequestSettings()))

    def put(self, **values: Any) -> None:
        values["policy"] = RequestPolicy(values["policy"])
        self._version += 1
        self._writer.write(Control(version=self._version, request=RequestSettings(**values)))


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv(RUN_DIR_VARIABLE, str(tmp_path))
    return Settings(tmp_path)
