"""Loads of clients: what is drawn from the published files, and what those files must be like."""

import csv
import gzip
import io
import itertools
import json

import numpy as np
import pytest
from moe_contract.input_errors import InvalidInput
from moe_lab.experiments.clients import (
    ARENA_FILE,
    CLIENTS_FILE,
    LENGTHS_FILE,
    LONGEST_THINK_S,
    SESSIONS_FILE,
    build_agents,
    build_arena,
    build_servegen,
    read_sessions,
)
from moe_lab.experiments.workloads import ALL, CLIENTS, CONTEXT_TOKENS

BUILDS = {SESSIONS_FILE: build_agents, ARENA_FILE: build_arena, CLIENTS_FILE: build_servegen}


def write_csv(path, names, rows):
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(names)
    writer.writerows(rows)
    raw = text.getvalue().encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def write_sessions(folder, rows):
    names = ("trace", "agent", "in_tokens", "out_tokens", "prefix_blocks", "think_time_s")
    write_csv(folder / SESSIONS_FILE, names, rows)


def growing(sessions, calls):
    """Sessions whose prompts grow by 64 tokens with each call."""
    return [
        (str(one), "0", 640 + 64 * n, "4", str(9 + n if n else 0), str(n))
        for one in range(sessions)
        for n in range(calls)
    ]


# Agents.


def test_the_calls_of_a_session_share_the_blocks_that_were_seen(tmp_path):
    write_sessions(
        tmp_path,
        [
            ("1", "0", "640", "10", "0", "0"),
            ("1", "0", "960", "0", "10", "4"),
            # The history was cut: fewer blocks than before are its beginning. Nobody knows how long the pause was.
            ("1", "0", "700", "5", "4", ""),
            ("2", "0", "128", "1", "0", "0"),
            ("1", "0", "100000", "5", "11", "3000"),
        ],
    )
    long, short = read_sessions(tmp_path / SESSIONS_FILE)
    assert [row.think_s for row in long] == [0.0, 4.0, 0.0]
    assert [len(row.blocks) for row in long] == [10, 15, 10]
    assert long[1].blocks[:10] == long[0].blocks
    assert long[2].blocks[:4] == long[1].blocks[:4]
    assert not set(long[2].blocks[4:]) & set(long[1].blocks)
    assert long[1].output_tokens == 1
    assert len(short) == 1


def test_conversations_grow_and_share_nothing_with_each_other(tmp_path):
    write_sessions(tmp_path, growing(5, 4))
    rows = build_agents(18, 3, tmp_path)
    assert len(rows) == 18
    by_name = {name: [row for row in rows if row.conversation == name] for name in {row.conversation for row in rows}}
    assert sorted(len(calls) for calls in by_name.values()) == [2, 4, 4, 4, 4]
    for calls in by_name.values():
        assert [row.prompt_tokens for row in calls] == [640 + 64 * n for n in range(len(calls))]
        # All but the newest 64 tokens are those of the call before.
        assert all(row.blocks[:-1] == before.blocks for before, row in itertools.pairwise(calls))
    owners = [{block for row in calls for block in row.blocks} for calls in by_name.values()]
    assert sum(map(len, owners)) == len(set().union(*owners))


def test_nobody_thinks_for_longer_than_a_minute(tmp_path):
    write_sessions(tmp_path, [("1", "0", "640", "4", "0", "0"), ("1", "0", "700", "4", "10", "5000")])
    assert [row.think_s for row in build_agents(2, 1, tmp_path)] == [0.0, LONGEST_THINK_S]


# The arena.


def test_tenants_keep_their_shares_and_their_lengths(tmp_path):
    rows = [("0", "10", "100")] * 30 + [("1", "2000", "5")] * 10 + [("2", "0", "0")]
    write_csv(tmp_path / ARENA_FILE, ("client", "prompt_len", "output_len"), rows)
    drawn = build_arena(4100, 1, tmp_path)
    counts = [sum(row.tenant == tenant for row in drawn) for tenant in range(3)]
    assert counts == pytest.approx([3000, 1000, 100], rel=0.3)
    assert {(row.tenant, row.prompt_tokens, row.output_tokens) for row in drawn} == {
        (0, 10, 100),
        (1, 2000, 5),
        (2, 1, 1),
    }


# ServeGen.

CLIENT_COLUMNS = ("client", "window_start_s", "rate_req_s", "gap_cv", "gap_dist", "arg1", "arg2")


def write_servegen(folder, rows, tables=None):
    write_csv(folder / CLIENTS_FILE, CLIENT_COLUMNS, rows)
    periods = {"0": {"input_tokens": [10, 20, 30], "output_tokens": [1, 2, 4]}}
    clients = tables or {row[0]: periods for row in rows}
    text = json.dumps({"quantiles": [0.0, 0.5, 1.0], "clients": clients})
    (folder / LENGTHS_FILE).write_bytes(gzip.compress(text.encode()))


def test_clients_keep_their_rates_and_their_bursts(tmp_path):
    # The second one's fit has half of the published mean gap: the published rate counts.
    write_servegen(
        tmp_path,
        [("7", "0", "3", "1", "Gamma", "1", "0.333"), ("8", "0", "1", "4", "Weibull", "0.4", "0.15")],
    )
    rows = build_servegen(8000, 1, tmp_path)
    assert len(rows) == 8000
    arrivals = {tenant: np.array([row.arrival_s for row in rows if row.tenant == tenant]) for tenant in (7, 8)}
    span_s = rows[-1].arrival_s
    assert len(arrivals[7]) / span_s == pytest.approx(3.0, rel=0.1)
    assert len(arrivals[8]) / span_s == pytest.approx(1.0, rel=0.2)
    gaps = {tenant: np.diff(times) for tenant, times in arrivals.items()}
    variation = {tenant: rows.std() / rows.mean() for tenant, rows in gaps.items()}
    assert variation[7] == pytest.approx(1.0, abs=0.1)
    assert variation[8] > 2.0
    assert [row.arrival_s for row in rows] == sorted(row.arrival_s for row in rows)


def test_lengths_are_drawn_from_the_quantiles_of_the_period(tmp_path):
    tables = {
        "7": {
            "0": {"input_tokens": [10, 20, 30], "output_tokens": [1, 1, 1]},
            "21600": {"input_tokens": [500, 500, 500], "output_tokens": [9, 9, 9]},
            "43200": {"input_tokens": None, "output_tokens": None},
        }
    }

    def lengths(window_s):
        write_servegen(tmp_path, [("7", window_s, "1", "1", "Gamma", "1", "1")], tables)
        rows = build_servegen(300, 1, tmp_path)
        return [row.prompt_tokens for row in rows], {row.output_tokens for row in rows}

    prompts, outputs = lengths("600")
    assert (min(prompts) >= 10, max(prompts) <= 30, outputs) == (True, True, {1})
    assert np.median(prompts) == pytest.approx(20, abs=2)
    # A period without quantiles has those of the last one that has some.
    for window_s in ("21600", "43200"):
        assert lengths(window_s) == ([500] * 300, {9})


def test_a_window_has_its_own_clients(tmp_path):
    write_servegen(tmp_path, [(str(n), str(600 * n), "1", "1", "Gamma", "1", "1") for n in range(6)])
    found = [{row.tenant for row in build_servegen(20, seed, tmp_path)} for seed in range(12)]
    assert all(len(tenants) == 1 for tenants in found)
    assert len(set.union(*found)) > 2


# Files.


@pytest.mark.parametrize("name", sorted(BUILDS))
@pytest.mark.parametrize("has_folder", [True, False])
def test_a_file_that_is_not_there_is_named(tmp_path, name, has_folder):
    with pytest.raises(InvalidInput, match=f"traces: a folder with {name} is needed"):
        BUILDS[name](10, 1, tmp_path if has_folder else None)


def test_both_files_of_servegen_are_needed(tmp_path):
    write_servegen(tmp_path, [("7", "0", "1", "1", "Gamma", "1", "1")])
    (tmp_path / LENGTHS_FILE).unlink()
    with pytest.raises(InvalidInput, match=LENGTHS_FILE):
        build_servegen(10, 1, tmp_path)


@pytest.mark.parametrize("name", sorted(BUILDS))
def test_a_file_with_other_columns_is_reported(tmp_path, name):
    write_servegen(tmp_path, [("7", "0", "1", "1", "Gamma", "1", "1")])
    write_csv(tmp_path / name, ("a", "b"), [("1", "2")])
    with pytest.raises(InvalidInput, match=f"{name}: is not as published"):
        BUILDS[name](10, 1, tmp_path)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (("7", "0", "1", "1", "Pareto", "1", "1"), "gap_dist 'Pareto'; known: Gamma, Weibull"),
        (("7", "0", "0", "1", "Gamma", "1", "1"), "no client sends"),
        (("7", "0", "often", "1", "Gamma", "1", "1"), "often"),
    ],
)
def test_a_client_that_cannot_be_drawn_is_reported(tmp_path, row, said):
    write_servegen(tmp_path, [row])
    with pytest.raises(InvalidInput, match=said):
        build_servegen(10, 1, tmp_path)


def test_quantiles_of_no_client_are_reported(tmp_path):
    write_servegen(tmp_path, [("7", "0", "1", "1", "Gamma", "1", "1")], {"8": {}})
    with pytest.raises(InvalidInput, match=f"{LENGTHS_FILE}: is not as published"):
        build_servegen(10, 1, tmp_path)


def test_sessions_of_one_call_are_no_conversations(tmp_path):
    write_sessions(tmp_path, growing(3, 1))
    with pytest.raises(InvalidInput, match="has no session of several calls"):
        build_agents(10, 1, tmp_path)


def test_a_file_that_is_not_compressed_is_reported(tmp_path):
    (tmp_path / SESSIONS_FILE).write_text("trace,agent\n")
    with pytest.raises(InvalidInput, match=f"{SESSIONS_FILE}: cannot be read"):
        build_agents(10, 1, tmp_path)


@pytest.mark.parametrize(
    "damaged",
    [b"no gzip", gzip.compress(b"{}")[:12], gzip.compress(b"{}")[:10] + bytes([7] * 20)],
    ids=["not compressed", "cut", "other bytes"],
)
def test_a_damaged_file_is_reported(tmp_path, damaged):
    write_servegen(tmp_path, [("7", "0", "1", "1", "Gamma", "1", "1")])
    for name, build in ((SESSIONS_FILE, build_agents), (LENGTHS_FILE, build_servegen)):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(InvalidInput, match=f"{name}: cannot be read"):
            build(10, 1, tmp_path)


@pytest.mark.parametrize("name", ["agents", "arena", "serveGen"])
def test_a_workload_is_the_same_for_its_seed_and_fits_the_engines(tmp_path, name):
    write_sessions(tmp_path, [(*row[:3], row[0], *row[4:]) for row in growing(20, 3)])
    write_csv(tmp_path / ARENA_FILE, ("client", "prompt_len", "output_len"), [("0", n, n) for n in range(1, 50)])
    tables = {"7": {"0": {"input_tokens": [10, 50_000, 90_000], "output_tokens": [1, 9_000, 30_000]}}}
    write_servegen(tmp_path, [("7", "0", "1", "1", "Gamma", "1", "1")], tables)
    kind = CLIENTS[name]
    rows = kind.build(50, 1, tmp_path)
    assert rows == kind.build(50, 1, tmp_path) != kind.build(50, 2, tmp_path)
    assert len(rows) == 50
    assert max(row.prompt_tokens + row.output_tokens for row in rows) <= kind.context_tokens


def test_on_off_conversations_have_clipped_prompts_and_short_answers(tmp_path):
    rows = [(f"2023-11-16 18:00:{n:02d}.0000000", 100 * n + 1, 211) for n in range(60)]
    write_csv(tmp_path / "azure_llm_2023_conv.csv", ("TIMESTAMP", "ContextTokens", "GeneratedTokens"), rows)
    drawn = ALL["azureOnOff"].build(60, 1, tmp_path)
    assert [row.prompt_tokens for row in drawn] == [min(7400, 2 * (100 * n + 1)) for n in range(60)]
    assert {row.output_tokens for row in drawn} == {28}
    assert ALL["azureOnOff"].context_tokens == CONTEXT_TOKENS
