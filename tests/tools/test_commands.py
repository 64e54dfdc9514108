"""The commands as a user meets them: what they print, write and answer to wrong input."""

import asyncio
import json

import pytest
from moe_contract.input_errors import InvalidInput
from moe_tools.api_key import read_api_key
from moe_tools.cli import app
from moe_tools.compare_command import ComparisonEffort, build_comparison_document, measure_pairs
from moe_tools.comparison import OURS, STOCK
from moe_tools.deployment import Deployment
from moe_tools.replay_command import Source, read_source
from moe_tools.server import ServedModel
from typer.testing import CliRunner

runner = CliRunner()
MODEL = ServedModel(name="m", max_tokens=300)


async def invoke(*arguments: str):
    """The command has its own event loop, while the server answers on the test's."""
    return await asyncio.to_thread(runner.invoke, app, list(arguments))


async def test_replay_prints_the_table_and_writes_rows(server, tmp_path):
    trace, out = tmp_path / "t.jsonl", tmp_path / "out.json"
    lines = [{"arrival_s": n / 100, "prompt_tokens": 20 + n, "output_tokens": 3} for n in range(8)]
    trace.write_text("\n".join(map(json.dumps, lines)))
    done = await invoke("replay", "--url", server.url, "--trace", str(trace), "--limit", "6", "--json", str(out))
    assert done.exit_code == 0, done.output
    assert "6 of 6 requests answered" in " ".join(done.output.split())
    document = json.loads(out.read_text())
    assert [row["prompt_tokens"] for row in document["rows"]] == [20, 21, 22, 23, 24, 25]
    assert sorted(len(body["prompt"]) for body in server.asked) == [20, 21, 22, 23, 24, 25]


@pytest.mark.parametrize("where", ["file", "environment", "both"])
async def test_replay_sends_the_servers_key(server, tmp_path, monkeypatch, where):
    server.key, path = "sk-1", tmp_path / "key"
    path.write_text("sk-1\n")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1" if where == "environment" else "sk-other")
    named = [] if where == "environment" else ["--api-key-file", str(path)]
    done = await invoke("replay", "--url", server.url, "--rate", "100", "--limit", "3", *named)
    assert done.exit_code == 0, done.output
    assert len(server.asked) == 3
    assert "sk-1" not in done.output


async def test_a_wrong_key_is_the_servers_to_refuse(server, monkeypatch):
    server.key = "sk-1"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-2")
    done = await invoke("replay", "--url", server.url)
    assert done.exit_code == 2
    assert "401" in done.output
    assert "sk-2" not in done.output


@pytest.mark.parametrize("text", ["", "\n", "two words", "a\nb", "caf\u00e9", None])
def test_a_file_that_holds_no_key_is_named(tmp_path, text):
    path = tmp_path / "key"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InvalidInput, match="--api-key-file"):
        read_api_key(path)


async def test_replay_cuts_to_what_the_server_takes_and_says_so(server):
    server.max_model_len = 64
    done = await invoke("replay", "--url", server.url, "--shape", "average", "--rate", "100", "--limit", "10")
    assert done.exit_code == 0, done.output
    assert "cut to 64 tokens" in done.output
    assert all(len(body["prompt"]) + body["max_tokens"] <= 64 for body in server.asked)


async def test_replay_with_failures_ends_with_status_1_and_shows_the_first(server):
    server.extra_tokens = 1
    done = await invoke("replay", "--url", server.url, "--rate", "100", "--limit", "3")
    assert done.exit_code == 1
    assert "wrong length" in done.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--url", "nowhere"], "url: must look like http://HOST:PORT"),
        (["--url", "http://127.0.0.1:9"], "http://127.0.0.1:9/v1/models: cannot connect"),
        (["--url", "http://127.0.0.1:9", "--shape", "round"], "shape: unknown 'round'; known: average"),
        (["--url", "http://127.0.0.1:9", "--trace", "/absent"], "/absent: cannot be read"),
        (["--url", "http://127.0.0.1:9", "--speed", "0"], "speed: must be more than 0"),
        (["--url", "http://127.0.0.1:9", "--rate", "-1"], "rate: must be more than 0"),
        (["--url", "http://127.0.0.1:9", "--max-tokens", "1"], "max-tokens: "),
    ],
)
def test_wrong_input_is_one_line_and_status_2(arguments, said):
    done = runner.invoke(app, ["replay", *arguments])
    assert done.exit_code == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_malformed_trace_is_found_before_the_server_is_asked(tmp_path):
    trace = tmp_path / "t.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,x,1\n")
    done = runner.invoke(app, ["compare", "tiny", "--url", "http://127.0.0.1:9", "--trace", str(trace)])
    assert done.exit_code == 2
    assert done.stderr.startswith(f"{trace}:2: ContextTokens: ")


def test_the_tiny_model_is_not_put_into_a_folder_of_other_things(tmp_path):
    (tmp_path / "a").write_text("b")
    done = runner.invoke(app, ["model", "tiny", str(tmp_path)])
    assert done.exit_code == 2
    assert "holds something other than a tiny model" in done.stderr


@pytest.mark.parametrize("limit", [2, 3, 10, 64, 300, 100_000])
def test_generated_requests_fit_any_model(limit):
    served = ServedModel(name="m", max_tokens=limit)
    fitted = read_source(Source(shape="average", limit=50), served)
    assert all(1 < row.prompt_tokens + row.output_tokens <= limit for row in fitted.requests)


def test_a_source_is_sped_up_scaled_and_cut(tmp_path):
    trace = tmp_path / "t"
    rows = [{"arrival_s": n, "prompt_tokens": 400 * n + 10, "output_tokens": 10} for n in range(3)]
    trace.write_text("\n".join(map(json.dumps, rows)))
    fitted = read_source(Source(trace=trace, speed=2.0, scale=0.5), MODEL)
    assert [row.arrival_s for row in fitted.requests] == [0, 0.5, 1.0]
    assert [row.prompt_tokens for row in fitted.requests] == [5, 205, 295]
    assert fitted.cut == 1


async def test_a_comparison_switches_through_the_command_and_leaves_our_policies(server, scripted_command, tmp_path):
    said: list[str] = []
    deployment = Deployment(name="tiny", state_dir=tmp_path)
    pairs, rate = await measure_pairs(
        deployment, server.url, None, Source(limit=40), ComparisonEffort(pairs=2, piece_s=0.2, rate=40.0), said.append
    )
    calls = scripted_command.read_text().splitlines()
    stock, ours = (f"set tiny {' '.join(policy.settings)} --state-dir {tmp_path}" for policy in (STOCK, OURS))
    assert calls == [ours, stock, ours, ours, stock, ours]
    assert rate == 40.0
    assert all(len(pair.stock.answered) == len(pair.ours.answered) == 8 for pair in pairs)
    document = build_comparison_document(pairs, Source(), ComparisonEffort(), rate)
    assert len(json.loads(json.dumps(document, default=str))["pairs"]) == 2


async def test_the_load_follows_from_the_measured_capacity(server, scripted_command):
    server.first_token_s = 0.02
    said: list[str] = []
    effort = ComparisonEffort(pairs=1, piece_s=0.5, load=0.5)
    _, rate = await measure_pairs(Deployment(name="tiny"), server.url, None, Source(limit=200), effort, said.append)
    assert rate > 0
    assert any("arrivals at 50% of that" in line for line in said)


async def test_one_request_in_flight_finds_no_more_than_one_at_a_time(server, scripted_command):
    server.first_token_s = 0.05
    effort = ComparisonEffort(pairs=1, piece_s=0.5, load=1.0, in_flight=1)
    _, rate = await measure_pairs(Deployment(name="tiny"), server.url, None, Source(limit=200), effort, lambda _: None)
    assert 0 < rate <= 1 / server.first_token_s


async def test_a_refused_switch_is_reported_in_its_own_words(scripted_command):
    (scripted_command.parent / "refuse").touch()
    with pytest.raises(InvalidInput, match="moeserving set tiny: no such deployment"):
        await Deployment(name="tiny").set(["a=b"])
