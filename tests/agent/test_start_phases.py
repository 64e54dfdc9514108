"""How far a start is: vLLM's log lines as phases, downloads by the growth of the hub's cache, and what is published."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_agent.supervisor.start_phases import (
    LOOK_EVERY_S,
    Download,
    StartLog,
    StartWatch,
    describe_download,
    find_model_cache,
    find_phase,
)

CORE = "(EngineCore pid=17798) INFO 11-30 08:46:09 "
# Lines of logs of vLLM 0.32, on a CPU but for the graphs.
LINES = [
    ("(APIServer pid=1) INFO 11-30 08:44:39 [api_utils.py:286] non-default args: {'host': ''}", "reading the model's"),
    (
        "(APIServer pid=1) INFO 11-30 08:44:39 [model.py:733] Resolved architecture: Qwen3MoeForCausalLM",
        "of Qwen3MoeFor",
    ),
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
    assert find_phase(line) is None if words is None else words in join(find_phase(line))


def join(phase: tuple[str, str] | None) -> str:
    assert phase is not None
    return f"{phase[0]} {phase[1]}".rstrip()


@given(st.lists(st.sampled_from(LINES), max_size=8), st.text(alphabet="ab %|/:()0\r\n", max_size=40))
def test_the_newest_known_line_decides_and_any_text_is_read(lines: list[tuple[str, str | None]], rest: str) -> None:
    text = "\r".join([*(line for line, _ in lines), rest])
    known = [words for _, words in lines if words is not None]
    assert (known[-1] in join(find_phase(text))) if known else find_phase(text) is None


def test_a_log_is_followed_from_now_on_also_within_a_line_that_is_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "engine.log"
    path.write_text("Application startup complete.\n")
    log = StartLog(path)
    assert join(log.read_phase()) == "loading Python packages"
    shards = "Loading safetensors checkpoint shards: {}% Completed | {}/3"
    with path.open("a") as file:
        for number in (1, 2):
            file.write(f"\r{shards.format(number * 33, number)}")
            file.flush()
            assert join(log.read_phase()) == f"loading weights {number} of 3 files"
        file.write("\nLoading wei")
        file.flush()
        assert join(log.read_phase()) == "loading weights 2 of 3 files"
        file.write("ghts took 1 second\n")
        file.flush()
        assert join(log.read_phase()) == "weights are loaded"
    path.write_text("")
    assert join(log.read_phase()) == "weights are loaded"
    path.unlink()
    assert join(log.read_phase()) == "weights are loaded"


def test_a_download_is_what_grows_in_the_hubs_cache(tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    download = Download(tmp_path)
    assert download.describe(0.0) == ""
    blobs.mkdir()
    (blobs / "abc.incomplete").write_bytes(bytes(2_000_000))
    assert download.describe(1.0) == "2 MB, 2 MB/s"
    index = tmp_path / "snapshots" / "rev" / "model.safetensors.index.json"
    index.parent.mkdir(parents=True)
    index.write_text(json.dumps({"metadata": {"total_size": 10_000_000}}))
    (blobs / "abc.incomplete").write_bytes(bytes(4_000_000))
    assert download.describe(2.0) == "4 MB of 10 MB, 2 MB/s, about 3 s left"
    index.unlink()
    (blobs / "gone").symlink_to("nowhere")
    (blobs / "zzz").write_bytes(bytes(2_000_000))
    assert download.describe(3.0) == "6 MB of 10 MB, 2 MB/s, about 2 s left", "its index is read once"
    assert download.describe(30.0) == "", "nothing came for some time"


@pytest.mark.parametrize(
    "index",
    [
        '{"metadata": {"total_size": 1e999}}',
        '{"metadata": {"total_size": NaN}}',
        '{"metadata": {"total_size": -1}}',
        '{"metadata": {"total_size": 1' + "0" * 400 + "}}",
        '{"metadata": []}',
        "[" * 100_000,
        "{}",
        "no JSON",
    ],
)
def test_an_index_of_a_model_may_say_anything(tmp_path: Path, index: str) -> None:
    """It comes from the model's owner, and an error would end the streams of the agent's state."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots" / "rev").mkdir(parents=True)
    (tmp_path / "snapshots" / "rev" / "model.safetensors.index.json").write_text(index)
    download = Download(tmp_path)
    download.describe(0.0)
    (tmp_path / "blobs" / "abc.incomplete").write_bytes(bytes(2_000_000))
    assert download.describe(1.0) == "2 MB, 2 MB/s"


def test_of_a_line_the_beginning_alone_is_read() -> None:
    """A line may be as long as a chat template, and its text that of anybody."""
    assert find_phase("Loading " * 200_000) is None
    name = "Resolved architecture: " + "a" * 100_000
    assert len(join(find_phase(name))) < 2_000


def test_a_download_above_its_total_and_without_a_pace_says_less() -> None:
    assert describe_download(5, 4, 0.0) == "0 MB, 0 MB/s"
    assert describe_download(3_100_000_000, 6_200_000_000, 0.0) == "3.1 GB of 6.2 GB, 0 MB/s"


@pytest.mark.parametrize(
    ("model", "environment", "folder"),
    [
        ("org/name", {"HF_HOME": "/h"}, "/h/hub/models--org--name"),
        ("org/name", {"HF_HUB_CACHE": "/c", "HF_HOME": "/h"}, "/c/models--org--name"),
        ("org/name", {"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub/models--org--name"),
        ("/models/tiny", {"HF_HOME": "/h"}, None),
        ("s3://bucket/name", {"HF_HOME": "/h"}, None),
    ],
)
def test_the_cache_is_the_one_that_the_engine_uses(model: str, environment: dict[str, str], folder: str | None) -> None:
    assert find_model_cache(model, environment) == (None if folder is None else Path(folder))


class Start:
    """A start whose log and cache are written by the test, on a clock that it moves."""

    def __init__(self, folder: Path) -> None:
        self.now_s, self.log, self.cache = 100.0, folder / "engine.log", folder / "cache"
        self.log.write_text("Application startup complete.\n")
        self.watch = StartWatch(self.log, self.cache, lambda: self.now_s)

    def add(self, line: str) -> None:
        with self.log.open("a") as file:
            file.write(line)

    def words_after(self, time_s: float) -> tuple[str, float]:
        self.now_s += time_s
        found = self.watch.progress()
        return found.words, found.age_s


def test_a_start_has_its_phase_since_when_and_a_version_that_changes_with_the_words(tmp_path: Path) -> None:
    start = Start(tmp_path)
    assert start.words_after(2.0) == ("loading Python packages", 2.0)
    version = start.watch.version
    start.add("Loading safetensors checkpoint shards: 33% Completed | 1/3\n")
    assert start.words_after(LOOK_EVERY_S / 2) == ("loading Python packages", 2.5), "it does not look at each call"
    assert start.words_after(LOOK_EVERY_S) == ("loading weights 1 of 3 files", 0.0)
    start.add("Loading safetensors checkpoint shards: 66% Completed | 2/3\n")
    assert start.words_after(4.0) == ("loading weights 2 of 3 files", 4.0), "numbers begin no phase"
    assert start.watch.version == version + 2
    start.watch.look()
    assert start.watch.version == version + 2
    start.watch.begin()
    assert start.words_after(1.0) == ("loading Python packages", 1.0), "what stood there is of the start before"


def test_a_download_is_the_phase_while_it_grows(tmp_path: Path) -> None:
    start = Start(tmp_path)
    start.words_after(1.0)
    (start.cache / "blobs").mkdir(parents=True)
    (start.cache / "blobs" / "abc.incomplete").write_bytes(bytes(3_000_000))
    assert start.words_after(1.0) == ("downloading 3 MB, 3 MB/s", 0.0)
    start.add("Starting to load model /m\n")
    assert start.words_after(60.0) == ("loading weights", 0.0)
