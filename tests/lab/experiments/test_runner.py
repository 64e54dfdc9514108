"""The making of runs: what happens when one of them fails."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from moe_lab.experiments import runner
from rich.console import Console


def test_a_run_that_fails_ends_the_series_and_those_before_it_are_kept(monkeypatch):
    begun, kept = [], []

    def measure(run, traces, rate):
        begun.append(run)
        if run == 3:
            raise ValueError("no such engine")
        return run

    monkeypatch.setattr(runner, "measure_run", measure)
    console = Console(force_terminal=True, quiet=True)
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="no such engine"):
        # One worker: run 2 is kept while run 3 is made, at the latest when it has failed.
        runner._work(pool, [(run, None, None) for run in range(500)], kept.append, "runs", console)
    assert {0, 1, 2} >= set(kept)
    assert len(begun) < 500
