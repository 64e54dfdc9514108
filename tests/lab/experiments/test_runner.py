"""The making of runs: what happens when one of them fails."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from moe_lab.experiments import runner
from rich.console import Console


def test_a_run_that_fails_ends_the_series_and_those_before_it_are_kept(monkeypatch):
    begun, kept, has_ended = [], [], threading.Event()

    def measure(run, traces, rate):
        begun.append(run)
        if run == 3:
            raise ValueError("no such engine")
        if run > 3:
            has_ended.wait(60)
        return run

    monkeypatch.setattr(runner, "measure_run", measure)
    console = Console(force_terminal=True, quiet=True)
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(ValueError, match="no such engine"):
            runner._work(pool, [(run, None, None) for run in range(500)], kept.append, "runs", console)
        has_ended.set()
    # Finished runs come in any order; at most one had begun when the failed one was seen.
    assert set(kept) <= {0, 1, 2}
    assert begun[:4] == [0, 1, 2, 3]
    assert len(begun) <= 5
