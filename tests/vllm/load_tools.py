"""How the field's load tools are run, and their times beside those that the gateway and the engine measured."""

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.vllm.conftest import Agent, Gateway

# `make` installs each tool in an environment of its own.
TOOLS = Path(__file__).parents[2] / ".cache/tools"
REQUESTS = 8
OUTPUT_TOKENS = 8
# A busy machine delays each of the three processes; a time of another thing than TTFT is off by more than this.
SLACK_S = 1.0
BENCH_SERVE = (
    "from vllm.benchmarks.serve import add_cli_args, main; "
    "from vllm.utils.argparse_utils import FlexibleArgumentParser; "
    "parser = FlexibleArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
)
GATEWAY_TTFT = "moeserving_gateway_ttft_seconds"
ENGINE_TTFT, ENGINE_ITL = "vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds"
ENGINE_TOKENS = "vllm:generation_tokens"


@dataclass(frozen=True, slots=True)
class Times:
    """Measured times of one kind: how many, and their sum in seconds."""

    count: int
    total_s: float

    @property
    def mean_s(self) -> float:
        return self.total_s / max(1, self.count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What gateway and engine have measured since their start."""

    gateway_ttft: Times
    engine_ttft: Times
    engine_itl: Times
    engine_tokens: int

    @classmethod
    def read(cls, gateway: Gateway, agent: Agent) -> "Measured":
        """Reads the metrics of both."""
        theirs, own = _scrape(f"{agent.url}/metrics"), _scrape(f"{gateway.admin_url}/metrics")
        return cls(
            gateway_ttft=_times(own, GATEWAY_TTFT),
            engine_ttft=_times(theirs, ENGINE_TTFT),
            engine_itl=_times(theirs, ENGINE_ITL),
            engine_tokens=int(theirs[f"{ENGINE_TOKENS}_total"]),
        )

    def since(self, before: "Measured") -> "Measured":
        """What was measured after `before`."""
        return Measured(
            gateway_ttft=_less(self.gateway_ttft, before.gateway_ttft),
            engine_ttft=_less(self.engine_ttft, before.engine_ttft),
            engine_itl=_less(self.engine_itl, before.engine_itl),
            engine_tokens=self.engine_tokens - before.engine_tokens,
        )


def _less(times: Times, before: Times) -> Times:
    return Times(times.count - before.count, times.total_s - before.total_s)


def _times(samples: dict[str, float], name: str) -> Times:
    return Times(int(samples[f"{name}_count"]), samples[f"{name}_sum"])


def _scrape(url: str) -> dict[str, float]:
    """Values by the names of samples, those of different labels added."""
    text, samples = urllib.request.urlopen(url, timeout=60).read().decode(), dict[str, float]()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples[sample.name] = samples.get(sample.name, 0.0) + sample.value
    return samples


def make_hub(tiny_model: Path, home: Path) -> Path:
    """A cache of Hugging Face's hub with the model's tokenizer as `moeserving/tiny`, since aiperf takes no path."""
    folder = home / "hub/models--moeserving--tiny"
    shutil.copytree(tiny_model, folder / "snapshots/one")
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("one")
    return home


def run_tool(command: list[str], hub: Path | None = None) -> None:
    """Runs a tool to its end; `hub` is a cache of Hugging Face's hub that has the tokenizer."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | ({} if hub is None else {"HF_HOME": str(hub)})
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment, check=False)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def check_aiperf(agent: Agent, gateway: Gateway, hub: Path, folder: Path, endpoint: str) -> None:
    """Runs aiperf through the gateway, with a header that names its sessions: no request fails, all count the same."""
    before, failures = Measured.read(gateway, agent), failed(gateway)
    asked = ["--isl", "60", "--osl", str(OUTPUT_TOKENS), "--request-count", str(REQUESTS), "--concurrency", "2"]
    where = ["--url", gateway.url, "--endpoint-type", endpoint, "--session-header", "X-Session-Affinity"]
    more = ["--tokenizer", "moeserving/tiny", "--ui", "none", "--output-artifact-dir", str(folder)]
    run_tool([str(TOOLS / "aiperf/bin/aiperf"), "profile", "-m", "tiny", "--streaming", *where, *asked, *more], hub)
    report = json.loads((folder / "profile_export_aiperf.json").read_text())
    assert report["request_count"]["avg"] == REQUESTS
    assert not report.get("error_summary")
    # On a busy machine all events of an answer may come at once.
    assert report["time_to_first_token"]["avg"] <= report["request_latency"]["avg"]
    assert failed(gateway) == failures
    ttft = Times(REQUESTS, report["time_to_first_token"]["avg"] / 1000 * REQUESTS)
    measured = Measured.read(gateway, agent).since(before)
    compare_times(f"aiperf, {endpoint}", ttft, report["inter_token_latency"]["avg"] / 1000, measured)


def bench_serve(url: str, tokenizer: Path, folder: Path) -> dict[str, float]:
    """The report of `vllm bench serve`, which finds the model by itself."""
    asked = ["--dataset-name", "random", "--random-input-len", "60", "--random-output-len", str(OUTPUT_TOKENS)]
    more = ["--ignore-eos", "--num-prompts", str(REQUESTS), "--base-url", url, "--tokenizer", str(tokenizer)]
    saved = ["--save-result", "--result-dir", str(folder), "--result-filename", "report.json"]
    run_tool([sys.executable, "-W", "ignore", "-c", BENCH_SERVE, *asked, *more, *saved, "--max-concurrency", "1"])
    report: dict[str, float] = json.loads((folder / "report.json").read_text())
    return report


def compare_times(tool: str, ttft: Times, itl_mean_s: float | None, measured: Measured) -> None:
    """Prints the times beside one another, and asserts that all three have measured the same requests.

    Counts are exact. Of the times only the order holds on a busy machine: what is nearer to the client takes longer.
    """
    rows = [("", "requests", "TTFT, ms", "between tokens, ms")]
    itl = "" if itl_mean_s is None else f"{itl_mean_s * 1000:.1f}"
    rows.append((tool, str(ttft.count), f"{ttft.mean_s * 1000:.1f}", itl))
    rows.append(("gateway", str(measured.gateway_ttft.count), f"{measured.gateway_ttft.mean_s * 1000:.1f}", ""))
    engine, engine_itl = measured.engine_ttft, measured.engine_itl
    rows.append(("engine", str(engine.count), f"{engine.mean_s * 1000:.1f}", f"{engine_itl.mean_s * 1000:.1f}"))
    print("\n" + "\n".join("{:<30}{:>10}{:>12}{:>20}".format(*row) for row in rows))
    above = [ttft.mean_s / measured.gateway_ttft.mean_s - 1, measured.gateway_ttft.mean_s / engine.mean_s - 1]
    print("TTFT: tool {:+.1%} of the gateway's, gateway {:+.1%} of the engine's".format(*above))
    if itl_mean_s is not None:
        print(f"between tokens: tool {itl_mean_s / engine_itl.mean_s - 1:+.1%} of the engine's")
    assert ttft.count == measured.gateway_ttft.count == measured.engine_ttft.count
    means_s = [measured.engine_ttft.mean_s, measured.gateway_ttft.mean_s, ttft.mean_s]
    assert all(near <= far + 0.005 for near, far in pairwise(means_s)), means_s
    assert means_s[2] < means_s[0] + SLACK_S
    assert itl_mean_s is None or abs(itl_mean_s - engine_itl.mean_s) < SLACK_S


def failed(gateway: Gateway) -> int:
    """Requests that have failed at the gateway."""
    return int(gateway.state()["totals"]["failed"])


def check_bench_serve(agent: Agent, gateway: Gateway, tokenizer: Path, folder: Path) -> None:
    """Runs `vllm bench serve` through the gateway: no request fails, and all three count the same."""
    before, failures = Measured.read(gateway, agent), failed(gateway)
    report = bench_serve(gateway.url, tokenizer, folder)
    measured = Measured.read(gateway, agent).since(before)
    assert (report["completed"], report.get("failed", 0), failed(gateway) - failures) == (REQUESTS, 0, 0)
    assert report["total_output_tokens"] == measured.engine_tokens == REQUESTS * OUTPUT_TOKENS
    ttft = Times(int(report["completed"]), report["mean_ttft_ms"] / 1000 * report["completed"])
    compare_times("vllm bench serve", ttft, report["mean_itl_ms"] / 1000, measured)
