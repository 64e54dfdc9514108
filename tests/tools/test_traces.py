"""Reading traces: three formats, and what a malformed line gets."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_contract.input_errors import InvalidInput
from moe_tools.traces import (
    TraceFormat,
    TraceRequest,
    cut_piece,
    fit_lengths,
    mean_rate,
    read_trace,
    rebase,
    scale_lengths,
    speed_up,
    spread_batches,
)

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""
MOONCAKE = """{"timestamp": 1000, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]}
{"timestamp": 3500, "input_length": 600, "output_length": 7, "hash_ids": [0, 9]}
"""
PLAIN = """{"arrival_s": 0.5, "prompt_tokens": 10, "output_tokens": 3}

{"arrival_s": 0.25, "prompt_tokens": 20, "output_tokens": 4, "blocks": [1], "block_tokens": 16}
"""


def write(folder: Path, text: str, name: str = "trace") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def request(arrival_s: float = 0.0, prompt: int = 10, output: int = 5, **more) -> TraceRequest:
    return TraceRequest(arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output, **more)


def test_azure_lines_become_requests_from_second_zero(tmp_path):
    first, second = read_trace(write(tmp_path, AZURE))
    assert (first.arrival_s, first.prompt_tokens, first.output_tokens, first.blocks) == (0.0, 374, 44, ())
    assert second.arrival_s == pytest.approx(4.314579)


def test_mooncake_lines_keep_their_shared_blocks(tmp_path):
    first, second = read_trace(write(tmp_path, MOONCAKE))
    assert (first.blocks, second.blocks) == ((0, 1, 2), (0, 9))
    assert (second.arrival_s, second.prompt_tokens, second.block_tokens) == (2.5, 600, 512)


def test_plain_lines_are_ordered_by_arrival_and_blank_ones_pass(tmp_path):
    first, second = read_trace(write(tmp_path, PLAIN))
    assert (first.prompt_tokens, first.blocks, first.block_tokens) == (20, (1,), 16)
    assert second.arrival_s == 0.25


@pytest.mark.parametrize(
    ("text", "name"), [(AZURE, TraceFormat.AZURE), (MOONCAKE, TraceFormat.MOONCAKE), (PLAIN, TraceFormat.JSONL)]
)
def test_the_format_found_is_the_format_named(tmp_path, text, name):
    path = write(tmp_path, text)
    assert read_trace(path) == read_trace(path, name.value)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (AZURE + "2023-11-16 18:16:00,twelve,3\n", ":4: ContextTokens: "),
        (AZURE + "yesterday,12,3\n", ":4: TIMESTAMP: "),
        (AZURE + "2023-11-16 18:16:00,12\n", ":4: GeneratedTokens: required, but absent"),
        (AZURE + "2023-11-16 18:16:00,0,3\n", ":4: ContextTokens: "),
        (AZURE + "2023-11-16 18:16:00,12,-3\n", ":4: GeneratedTokens: "),
        (MOONCAKE + '{"timestamp": 1', ":3: is not JSON"),
        (MOONCAKE + "[1, 2]\n", ":3: "),
        (MOONCAKE + '{"timestamp": -1, "input_length": 1, "output_length": 1}\n', ":3: timestamp: "),
        (MOONCAKE + '{"timestamp": NaN, "input_length": 1, "output_length": 1}\n', ":3: timestamp: "),
        (MOONCAKE + '{"timestamp": 1, "input_length": 1.5, "output_length": 1}\n', ":3: input_length: "),
        (
            PLAIN + '{"arrival_s": 1, "prompt_tokens": 1, "output_token": 1}\n',
            ":4: output_token: unknown field; nearest",
        ),
        ("hello\n", ":1: the first line fits no known format; known: azure, jsonl, mooncake"),
    ],
)
def test_a_malformed_line_is_reported_by_file_and_number(tmp_path, text, where):
    path = write(tmp_path, text)
    with pytest.raises(InvalidInput) as caught:
        read_trace(path)
    assert f"{path}{where}" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"\xff\xfe\x00bin", "is not UTF-8 text"), (AZURE.splitlines()[0].encode(), "has no requests")],
)
def test_a_file_that_is_no_trace_is_reported(tmp_path, content, message):
    path = tmp_path / "trace"
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=message):
        read_trace(path)


def test_an_absent_file_and_a_folder_are_reported(tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(InvalidInput, match="cannot be read"):
            read_trace(path)


def test_an_unknown_format_names_the_known_ones(tmp_path):
    with pytest.raises(InvalidInput, match="format: unknown 'csv'; known: azure, jsonl, mooncake"):
        read_trace(write(tmp_path, AZURE), "csv")


requests_strategy = st.lists(
    st.builds(
        request,
        arrival_s=st.floats(0, 1e6),
        prompt=st.integers(1, 200_000),
        output=st.integers(1, 200_000),
        blocks=st.lists(st.integers(0, 5), max_size=3).map(tuple),
    ),
    min_size=1,
    max_size=30,
)


@given(requests_strategy, st.integers(2, 10_000))
def test_fitted_requests_fit_and_only_long_ones_are_touched(requests, limit):
    fitted = fit_lengths(requests, limit)
    for before, after in zip(requests, fitted.requests, strict=True):
        assert after.prompt_tokens >= 1
        assert after.output_tokens >= 1
        assert after.prompt_tokens + after.output_tokens <= limit
        if before.prompt_tokens + before.output_tokens <= limit:
            assert after == before
    assert fitted.cut == sum(before != after for before, after in zip(requests, fitted.requests, strict=True))


@given(requests_strategy)
def test_without_a_limit_nothing_is_cut(requests):
    assert fit_lengths(requests, None).requests == tuple(requests)


def test_what_was_cut_is_said():
    assert "1 of them cut to 100 tokens" in str(fit_lengths([request(prompt=99), request()], 100))


@given(requests_strategy, st.floats(0.01, 100))
def test_speed_changes_times_and_nothing_else(requests, speed):
    for before, after in zip(requests, speed_up(requests, speed), strict=True):
        assert math.isclose(after.arrival_s * speed, before.arrival_s, abs_tol=1e-6)
        assert after.prompt_tokens == before.prompt_tokens


@given(requests_strategy)
def test_rebasing_orders_and_keeps_every_request(requests):
    based = rebase(requests)
    assert based[0].arrival_s == 0
    assert [row.arrival_s for row in based] == sorted(row.arrival_s for row in based)
    assert sorted(row.prompt_tokens for row in based) == sorted(row.prompt_tokens for row in requests)


def test_scaled_lengths_scale_the_shared_blocks_too():
    (scaled,) = scale_lengths([request(prompt=1024, output=1, blocks=(1, 2))], 0.25)
    assert (scaled.prompt_tokens, scaled.output_tokens, scaled.block_tokens) == (256, 1, 128)


@pytest.mark.parametrize("factor", [0, -1, math.nan, math.inf])
def test_impossible_factors_are_reported(factor):
    with pytest.raises(InvalidInput, match=r"^scale-lengths: "):
        scale_lengths([request()], factor)
    with pytest.raises(InvalidInput, match=r"^speed: "):
        speed_up([request()], factor)


def test_a_piece_begins_at_second_zero():
    piece = cut_piece([request(float(n)) for n in range(10)], 4, 3)
    assert [row.arrival_s for row in piece] == [0.0, 1.0, 2.0]
    assert mean_rate(piece) == 1.0
    assert math.isinf(mean_rate(cut_piece([request(), request()], 0)))


def test_json_of_a_request_reads_back(tmp_path):
    line = {"arrival_s": 0.0, "prompt_tokens": 3, "output_tokens": 2, "blocks": [1], "block_tokens": 2}
    (read,) = read_trace(write(tmp_path, json.dumps(line)))
    assert read == request(prompt=3, output=2, blocks=(1,), block_tokens=2)


def mooncake_lines(times_ms):
    rows = ({"timestamp": time, "input_length": n + 1, "output_length": 1} for n, time in enumerate(times_ms))
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def test_batches_on_mooncakes_grid_are_spread_in_their_order(tmp_path):
    times_ms = [0] * 20 + [2999] * 20 + [6000, 9001]
    rows = read_trace(write(tmp_path, mooncake_lines(times_ms)), seed=3)
    assert [row.prompt_tokens for row in rows] == list(range(1, 43))
    assert len({row.arrival_s for row in rows}) == 42
    # Counted from the first arrival, which lies within the first 3 s itself.
    first, second = rows[:20], rows[20:40]
    assert 1.0 < first[-1].arrival_s < 3.0 < second[-1].arrival_s < 6.0
    assert rows == read_trace(write(tmp_path, mooncake_lines(times_ms)), seed=3)
    assert rows != read_trace(write(tmp_path, mooncake_lines(times_ms)), seed=4)


@pytest.mark.parametrize("times_ms", [[0, 3000, 6500], [0, 0, 0], [5], [1, 2, 3000]])
def test_other_times_stay_as_they_are(tmp_path, times_ms):
    rows = read_trace(write(tmp_path, mooncake_lines(times_ms)))
    assert [row.arrival_s for row in rows] == pytest.approx([(time - times_ms[0]) / 1000 for time in times_ms])


@given(st.lists(st.integers(0, 50), min_size=1, max_size=60), st.integers(0, 1000))
def test_spread_requests_stay_in_the_three_seconds_of_their_batch(ticks, seed):
    rows = [TraceRequest(arrival_s=3.0 * tick, prompt_tokens=1, output_tokens=1) for tick in sorted(ticks)]
    spread = spread_batches(rows, seed)
    assert len(spread) == len(rows)
    for before, after in zip(rows, spread, strict=True):
        assert before.arrival_s <= after.arrival_s <= before.arrival_s + 3.0
    assert [row.arrival_s for row in spread] == sorted(row.arrival_s for row in spread)
