"""How far a start is: vLLM's log lines as phases, downloads by the growth of the hub's cache, and the lines shown."""

import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_operator.cli.start import StartWatch, join_phases
from moe_operator.local.folder import Folder
from moe_operator.local.start_phases import Download, StartLog, describe_download, find_model_cache, find_phase
from moe_operator.progress import AGAIN_AFTER_S, ProgressLine, describe_share, describe_time, estimate_left_s

CORE = "(EngineCore pid=17798) INFO 11-30 08:46:09 "
# Lines of logs of vLLM 0.32, on a CPU but for the graphs.
LINES = [
    ("(APIServer pid=1) INFO 11-30 08:44:39 [api_utils.py:286] non-default args: {'host': ''}", "reading the model's"),
    ("(APIServer pid=1) INFO 11-30 08:44:39 [model.py:733] Resolved architecture: Qwen3MoeForCausalLM", "(Qwen3MoeFor"),
    (f"{CORE}[core.py:133] Initializing a V1 LLM engine (v0.32.0) with config: model='/m'", "setting up devices"),
    (f"{CORE}[cpu_model_runner.py:68] Starting to load model /m...", "loading weights"),
    ("Loading safetensors checkpoint shards:  33% Completed | 1/3 [00:00<00:01,  1.2it/s]", "weights 1 of 3 files"),
    (f"{CORE}[default_loader.py:501] Loading weights took 0.42 seconds", "weights are loaded"),
    (f"{CORE}[backends.py:1105] Using cache directory: /c for vLLM's torch.compile", "compiling"),
    (f"{CORE}[cpu_model_runner.py:87] Warming up model for the compilation...", "compiling"),
    (f"{CORE}[gpu_worker.py:760] Available KV cache memory: 3.1 GiB", "measuring room for the KV cache"),
    (f"{CORE}[kv_cache_utils.py:2327] CPU KV cache size: 771,328 tokens, Maximum", "KV cache of 771,328 tokens"),
    (
        "Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):  40%|####    | 14/35 [00:01<00:02]",
        "graphs 14 of 35",
    ),
    (f"{CORE}[gpu_model_runner.py:6582] Graph capturing finished in 5 secs, took 0.5 GiB", "graphs are captured"),
    (f"{CORE}[core.py:402] init engine (profile, create kv cache, warmup model) took 5.61 s", "the HTTP server"),
    ("(APIServer pid=1) INFO:     Application startup complete.", "answers soon"),
    ("Triton is installed, but doesn't include CPU backend. Disabling Triton.", None),
]


@pytest.mark.parametrize(("line", "words"), LINES)
def test_a_line_of_the_log_is_a_phase(line: str, words: str | None) -> None:
    assert find_phase(line) == "" if words is None else words in find_phase(line)


@given(st.lists(st.sampled_from(LINES), max_size=8), st.text(alphabet="ab %|/:()0\r\n", max_size=40))
def test_the_newest_known_line_decides_and_any_text_is_read(lines: list[tuple[str, str | None]], rest: str) -> None:
    text = "\r".join([*(line for line, _ in lines), rest])
    known = [words for _, words in lines if words is not None]
    assert (known[-1] in find_phase(text)) if known else find_phase(text) == ""


def test_a_log_is_followed_from_now_on_also_within_a_line_that_is_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "engine.log"
    path.write_text("Application startup complete.\n")
    log = StartLog(path)
    assert log.read_phase() == "loading Python packages"
    shards = "Loading safetensors checkpoint shards: {}% Completed | {}/3"
    with path.open("a") as file:
        for number in (1, 2):
            file.write(f"\r{shards.format(number * 33, number)}")
            file.flush()
            assert log.read_phase() == f"loading weights {number} of 3 files"
        file.write("\nLoading wei")
        file.flush()
        assert log.read_phase() == "loading weights 2 of 3 files"
        file.write("ghts took 1 second\n")
        file.flush()
        assert log.read_phase() == "weights are loaded"
    path.write_text("")
    assert log.read_phase() == "weights are loaded"
    path.unlink()
    assert log.read_phase() == "weights are loaded"


def test_a_download_is_what_grows_in_the_hubs_cache(tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    download = Download(tmp_path)
    assert download.describe(0.0) == ""
    blobs.mkdir()
    (blobs / "abc.incomplete").write_bytes(bytes(2_000_000))
    assert download.describe(1.0) == "downloading 2 MB, 2 MB/s"
    index = tmp_path / "snapshots" / "rev" / "model.safetensors.index.json"
    index.parent.mkdir(parents=True)
    index.write_text(json.dumps({"metadata": {"total_size": 10_000_000}}))
    (blobs / "abc.incomplete").write_bytes(bytes(4_000_000))
    assert download.describe(2.0) == "downloading 4 MB of 10 MB, 2 MB/s, about 3 s left"
    index.unlink()
    (blobs / "gone").symlink_to("nowhere")
    (blobs / "zzz").write_bytes(bytes(2_000_000))
    assert download.describe(3.0) == "downloading 6 MB of 10 MB, 2 MB/s, about 2 s left", "its index is read once"
    assert download.describe(30.0) == "", "nothing came for some time"


def test_a_download_above_its_total_and_without_a_pace_says_less() -> None:
    assert describe_download(5, 4, 0.0) == "downloading 0 MB, 0 MB/s"
    assert describe_download(3_100_000_000, 6_200_000_000, 0.0) == "downloading 3.1 GB of 6.2 GB, 0 MB/s"


@pytest.mark.parametrize(
    ("uri", "environment", "folder"),
    [
        ("hf://org/name", {"HF_HOME": "/h"}, "/h/hub/models--org--name"),
        ("hf://org/name@main", {"HF_HUB_CACHE": "/c", "HF_HOME": "/h"}, "/c/models--org--name"),
        ("hf://org/name", {"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub/models--org--name"),
        ("file:///models/tiny", {"HF_HOME": "/h"}, None),
    ],
)
def test_the_cache_is_the_one_that_the_engine_uses(uri: str, environment: dict[str, str], folder: str | None) -> None:
    assert find_model_cache(uri, environment) == (None if folder is None else Path(folder))


def test_the_line_of_a_start_has_each_engine_once(tmp_path: Path) -> None:
    start = StartWatch(Folder(root=tmp_path, name="a"))
    phases = {"a-engine-0": "starting", "a-engine-1": "starting"}
    assert start.describe(phases, 3.0)[0] == "a: 3 s: 2 engines: loading Python packages"
    log = tmp_path / "a" / "a-engine-1" / "engine.log"
    log.parent.mkdir(parents=True)
    log.write_text("Loading safetensors checkpoint shards: 33% Completed | 1/3\n")
    line, phase = start.describe(phases | {"a-engine-0": "ready"}, 4.0)
    assert line == "a: 4 s: engine-0 ready, engine-1 loading weights 1 of 3 files"
    log.write_text("Loading safetensors checkpoint shards: 66% Completed | 2/3, now longer\n")
    assert start.describe(phases | {"a-engine-0": "ready"}, 5.0)[1] == phase, "numbers begin no phase"


def test_engines_at_the_same_point_are_named_together() -> None:
    assert join_phases("a", {"a-engine-0": "x"}) == "engine-0 x"
    assert join_phases("a", {"a-engine-0": "x", "a-engine-1": "y"}) == "engine-0 x, engine-1 y"


def test_in_a_terminal_one_line_is_rewritten_within_its_width() -> None:
    output = io.StringIO()
    line = ProgressLine(output, columns=10)
    line.show("0123456789abc")
    line.show("second")
    line.close()
    line.close()
    assert output.getvalue() == "\r\x1b[2K012345678\r\x1b[2Ksecond\r\x1b[2K"


def test_elsewhere_a_phase_is_a_line_that_is_repeated_after_a_while() -> None:
    output, now_s = io.StringIO(), [0.0]
    line = ProgressLine(output, columns=None, clock=lambda: now_s[0])
    for at_s, text in ((0.0, "load 1"), (1.0, "load 2"), (AGAIN_AFTER_S, "load 3"), (AGAIN_AFTER_S + 1, "end")):
        now_s[0] = at_s
        line.show(text, phase=text[:4])
    line.close()
    assert output.getvalue().splitlines() == ["load 1", "load 3", "end"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min 0 s"), (3599, "59 min 59 s"), (7500, "2 h 5 min")]
)
def test_a_time_has_two_units_at_most(seconds: float, text: str) -> None:
    assert describe_time(seconds) == text


def test_the_time_left_is_that_of_the_pace_so_far() -> None:
    assert estimate_left_s(0, 8, 10.0) is None
    assert estimate_left_s(9, 8, 10.0) == 0.0
    assert describe_share(0, 8, 5.0) == "0 of 8"
    assert describe_share(2, 8, 20.0) == "2 of 8, about 1 min 0 s left"
