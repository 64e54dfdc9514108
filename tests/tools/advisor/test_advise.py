"""`moeserving plan --advise`: the question, its errors, the ranking, and one whole run."""

import io
import json
import logging
import math
import sys
from dataclasses import replace

import pytest
from moe_contract.input_errors import InvalidInput
from moe_tools.advisor import advise as advisor
from moe_tools.advisor.advise import AdviceRequest, read_question
from moe_tools.advisor.candidates import Candidate
from moe_tools.advisor.clocks import CLOCKS, MOST_KV_BLOCKS, RooflineClock, ServerParallelism
from moe_tools.advisor.fleet import FleetLoad, FleetShape, build_fleet
from moe_tools.advisor.results import MODEL_ERROR, Advice, Bounds, explain, rank, render, to_document
from moe_tools.cli import app
from moe_tools.simulator.fitted_presets import FITTED_PRESETS
from moe_tools.simulator.hardware import PRESETS
from moe_tools.traces import mean_rate
from rich.console import Console
from typer.testing import CliRunner

runner = CliRunner()
BOUNDS = Bounds(ttft_s=2.0, inter_token_s=0.05)
QWEN = "hf://Qwen/Qwen3-30B-A3B"


@pytest.fixture
def resource(tmp_path):
    def write(uri=QWEN, **engine):
        document = {
            "apiVersion": "moeserving.dev/v1alpha1",
            "kind": "MoEServing",
            "metadata": {"name": "q"},
            "spec": {"model": {"uri": uri, "name": "m"}, "engine": engine},
        }
        path = tmp_path / "q.yaml"
        path.write_text(json.dumps(document))
        return path

    return write


def on_gpu(product):
    """Engines on nodes whose GPU has this product label."""
    return {"podTemplate": {"spec": {"nodeSelector": {"nvidia.com/gpu.product": product}}}}


def asked(path, **values):
    return AdviceRequest(**{"file": path, "rate": 4.0, "requests": 20, **values})


def errors(request):
    with pytest.raises(InvalidInput) as caught:
        read_question(request)
    return [str(row) for row in caught.value.errors]


def test_the_question_takes_gpus_limits_and_scheduling_of_the_file(resource):
    path = resource(
        replicas=2,
        parallelism={"data": 2, "expert": True},
        args=["--max-model-len=8192", "--max-num-batched-tokens", "4096"],
    )
    question = read_question(asked(path))
    assert {row.shape.gpus for row in question.candidates} == {4}
    assert {row.step_tokens for row in question.candidates} == {4096}
    assert [row.servers for row in question.candidates if row.is_present] == ["2 of 2"]
    assert question.load.max_model_len == 8192
    assert question.load.clock.cost(ServerParallelism(4)) == FITTED_PRESETS["h100-qwen3-30b-a3b-kernels-dp4"].cost(4)
    assert len(question.load.trace) == 20
    assert all(row.prompt_tokens + row.output_tokens <= 8192 for row in question.load.trace)


def test_the_question_takes_roles_and_bounds_of_the_file(resource):
    path = resource(roles={"mode": "fixed", "prefill": 1, "decode": 3})
    document = json.loads(path.read_text())
    document["spec"]["scheduling"] = {"engine": {"targets": {"ttft": "1s", "interToken": "20ms"}}}
    path.write_text(json.dumps(document))
    question = read_question(asked(path))
    assert [row.roles for row in question.candidates if row.is_present] == ["{prefill: 1, decode: 3}"]
    assert (question.load.targets.ttft_s, question.load.targets.inter_token_s) == (1.0, 0.02)
    assert question.bounds == Bounds(ttft_s=1.0, inter_token_s=0.02)
    assert read_question(asked(path, ttft_s=3.0)).bounds == Bounds(ttft_s=3.0, inter_token_s=0.02)


def test_without_targets_and_options_the_bounds_are_those_of_the_documentation(resource):
    assert read_question(asked(resource())).bounds == BOUNDS


@pytest.mark.parametrize(
    ("engine", "sequences"),
    [({}, 1024), (on_gpu("NVIDIA-A100-80GB"), 256), ({"args": ["--max-num-seqs=96"]}, 96)],
)
def test_an_engine_has_as_many_sequences_as_vllm_on_that_gpu(resource, engine, sequences):
    question = read_question(asked(resource(**engine)))
    (server, *_) = build_fleet(question.candidates[0].shape, question.load).fleet
    assert server.limits.max_num_seqs == sequences


@pytest.mark.parametrize(("text", "tokens"), [("8k", 8000), ("8K", 8192), ("4096", 4096)])
def test_lengths_are_read_as_vllm_reads_them(resource, text, tokens):
    assert read_question(asked(resource(args=[f"--max-model-len={text}"]))).load.max_model_len == tokens


def test_a_length_that_is_no_number_is_named(resource):
    found = errors(asked(resource(args=["--max-model-len=auto"])))
    assert found == [
        "spec.engine.args: --max-model-len auto: the simulation needs a number of at least 1, such as 4096 or 32k"
    ]


def test_requests_that_are_cut_are_counted(resource, tmp_path):
    trace = tmp_path / "requests.jsonl"
    rows = [{"timestamp": 1000 * n, "input_length": 99_999, "output_length": 5, "hash_ids": []} for n in range(20)]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    question = read_question(asked(resource(args=["--max-model-len=2048"]), trace=trace, rate=None))
    assert question.cut == 20


@pytest.mark.parametrize(
    ("parallelism", "replicas", "servers"),
    [
        ({"tensor": 2}, 2, "2 of tensor 2"),
        ({"tensor": 2, "expert": True}, 2, "2 of tensor 2, experts spread"),
        ({"tensor": 2, "data": 2, "expert": True}, 1, "1 of tensor 2 x data 2, experts spread"),
        ({"data": 4, "expert": True}, 1, "1 of 4"),
        ({}, 4, "4 of 1"),
    ],
)
def test_servers_with_tensor_parallelism_are_compared_where_they_were_measured(
    resource, parallelism, replicas, servers
):
    path = resource("hf://Qwen/Qwen3.6-35B-A3B", replicas=replicas, parallelism=parallelism)
    question = read_question(asked(path))
    assert {row.shape.gpus for row in question.candidates} == {4}
    assert [row.servers for row in question.candidates if row.is_present] == [servers]
    assert {row.servers for row in question.candidates} == {
        "1 of 4", "4 of 1", "1 of tensor 4", "1 of tensor 4, experts spread", "2 of tensor 2",
        "2 of tensor 2, experts spread", "1 of tensor 2 x data 2, experts spread",
    }  # fmt: skip
    assert question.excluded == []


def test_a_file_with_tensor_parallelism_that_was_not_measured_gets_the_others(resource):
    question = read_question(asked(resource(replicas=2, parallelism={"tensor": 2})))
    assert {row.shape.gpus for row in question.candidates} == {4}
    assert not any(row.is_present for row in question.candidates)


@pytest.mark.parametrize(("name", "known"), CLOCKS.items())
def test_each_clock_names_presets_of_its_groups(name, known):
    for group, preset in known.fitted.items():
        assert FITTED_PRESETS[preset].ranks == group.ranks, name
        assert (FITTED_PRESETS[preset].model.expert_ranks > 1) == (group.expert and group.gpus > 1), name


def test_blocks_travel_between_ranks_of_several_gpus_over_all_their_links(resource):
    path = resource("hf://Qwen/Qwen3.6-35B-A3B", replicas=4)
    question = read_question(asked(path))
    links = {
        row.servers: build_fleet(row.shape, question.load).transfers.link.bytes_per_s
        for row in question.candidates
        if row.shape.prefill == 1
    }
    assert links["2 of tensor 2"] == 2 * links["4 of 1"]


def test_a_trace_is_cut_and_sped_up_to_the_rate(resource, tmp_path):
    trace = tmp_path / "t.jsonl"
    lines = [{"arrival_s": float(n), "prompt_tokens": 20, "output_tokens": 3} for n in range(50)]
    trace.write_text("\n".join(map(json.dumps, lines)))
    question = read_question(asked(resource(), trace=trace, rate=None))
    assert mean_rate(question.load.trace) == pytest.approx(1.0)
    question = read_question(asked(resource(), trace=trace, rate=5.0))
    assert (len(question.load.trace), mean_rate(question.load.trace)) == (20, pytest.approx(5.0))


@pytest.mark.parametrize(
    ("values", "engine", "said"),
    [
        ({"rate": None}, {}, ["--rate: is needed without --trace"]),
        ({"rate": -1.0}, {}, ["--rate: must be more than 0, got -1"]),
        ({"rate": math.nan}, {}, ["--rate: must be more than 0, got nan"]),
        ({"requests": 3}, {}, ["--requests: must be 20 or more, got 3"]),
        ({"ttft_s": 0.0}, {}, ["--ttft: must be more than 0"]),
        ({"cost": "h200"}, {}, ["--cost: unknown 'h200'; known: a100-qwen3-30b-a3b, b300"]),
        ({"shape": "round"}, {}, ["shape: unknown 'round'; known: average"]),
        ({}, {"runtime": "vllm-cpu"}, ["spec.engine.runtime: step times of CPUs are not in the model"]),
        ({}, {"replicas": 200}, ["spec.engine: has 200 GPUs; at most 64"]),
        ({"cost": "h100-deepseek-v3"}, {"replicas": 2}, ["spec.engine: no shape of 2 GPUs holds the model"]),
        (
            {"cost": "h200-deepseek-v3"},
            {"replicas": 2},
            ["spec.engine: h200-deepseek-v3 has step times of"],
        ),
        ({}, on_gpu("NVIDIA-L40S"), [f"spec.model.uri: no step times are known for {QWEN} on NVIDIA-L40S"]),
    ],
)
def test_unusable_input_is_named_with_its_place(resource, values, engine, said):
    found = errors(asked(resource(**engine), **values))
    assert [row.startswith(part) for row, part in zip(found, said, strict=True)] == [True] * len(said), found


def test_a_model_without_step_times_is_named_with_those_that_are_known(resource):
    (found,) = errors(asked(resource(uri="hf://org/other-moe")))
    assert found.startswith("spec.model.uri: no step times are known for hf://org/other-moe")
    assert "h100-qwen3-30b-a3b" in found
    assert read_question(asked(resource(uri="hf://org/other-moe"), cost="h100-qwen3-30b-a3b")).candidates


@pytest.mark.parametrize(
    ("uri", "engine", "source", "said"),
    [
        (QWEN, {}, "modelled from kernels", "The file names no GPU (nvidia.com/gpu.product): H100 is assumed"),
        (QWEN, on_gpu("NVIDIA-H200"), "modelled from kernels", "compared with no engine"),
        (QWEN, on_gpu("NVIDIA-A100-SXM4-80GB"), "modelled: roofline", "Rooflines were not compared with a GPU"),
        ("hf://Qwen/Qwen3.6-35B-A3B", on_gpu("NVIDIA-B300"), "measured: vLLM 0.20.1", "on held-out shapes"),
    ],
)
def test_the_step_times_are_those_of_the_files_gpu_and_model_and_say_their_error(resource, uri, engine, source, said):
    question = read_question(asked(resource(uri, replicas=4, **engine)))
    assert question.load.clock.source.startswith(source)
    assert source.split(":")[0] in question.clock
    assert said in question.clock
    assert ("assumed" in question.clock) == (not engine)
    document = advisor.build_document(question, [])
    assert document["cost_error"] == question.clock


def test_a_gpu_whose_name_contains_another_ones_is_not_taken_for_it(resource):
    (found,) = errors(asked(resource(QWEN, **on_gpu("NVIDIA-GH200-480GB"))))
    assert f"no step times are known for {QWEN} on NVIDIA-GH200-480GB" in found


@pytest.mark.parametrize(("ranks", "copies"), [(1, 0), (3, 0), (4, 4)])
def test_copies_of_experts_are_tried_where_the_experts_divide_among_the_ranks(ranks, copies):
    assert RooflineClock(preset=PRESETS["h100-qwen3-30b-a3b"]).copies(ServerParallelism(ranks)) == copies


def test_shapes_without_fitted_step_times_are_left_out_by_name(resource):
    question = read_question(asked(resource("hf://deepseek-ai/DeepSeek-V4-Flash", replicas=8)))
    assert {row.servers for row in question.candidates} == {"2 of 4", "2 of tensor 4, experts spread"}
    assert [row.servers for row in question.excluded] == ["1 of 8", "4 of 2", "8 of 1"]
    assert question.excluded[1].reason == "step times of a group of 2 are not among the fitted ones"
    # Their placement is that of the measured engine.
    assert question.load.clock.copies(ServerParallelism(4)) == 0


def test_a_roofline_serves_where_the_gpus_cannot_be_cut_into_measured_servers(resource):
    question = read_question(asked(resource("hf://deepseek-ai/DeepSeek-V3", replicas=32)))
    assert question.load.clock.source.startswith("modelled from kernels")
    question = read_question(asked(resource("hf://deepseek-ai/DeepSeek-V3", replicas=24)))
    assert question.load.clock.source.startswith("modelled: roofline of DeepSeek-V3")
    assert question.load.clock.copies(ServerParallelism(8)) == 8


@pytest.mark.parametrize(
    ("engine", "tokens"),
    [({}, 8192), (on_gpu("NVIDIA-A100-80GB"), 2048)],
)
def test_a_step_has_the_tokens_that_vllm_has_by_default_on_that_gpu(resource, engine, tokens):
    question = read_question(asked(resource(**engine)))
    assert {row.step_tokens for row in question.candidates} == {tokens}


def test_a_server_of_ranks_that_were_measured_alone_stands_for_all_gpus_in_the_figures_of_a_request_alone(resource):
    question = read_question(asked(resource("hf://Qwen/Qwen3.6-35B-A3B", replicas=8)))
    fleet = build_fleet(FleetShape(servers=(4, 4)), question.load)
    assert (fleet.ranks, fleet.cost.model.ranks) == (4, 4)
    assert [server.cost.model.ranks for server in fleet.fleet] == [4, 4]
    assert fleet.limits.kv_blocks == MOST_KV_BLOCKS


def advice(servers=(4,), *, roles="unified", good=1.0, end=1.0, failed=0, **shape):
    candidate = Candidate(
        shape=FleetShape(servers=servers, **shape), servers=f"{len(servers)} of {servers[0]}", roles=roles,
        step_tokens=2048,
    )  # fmt: skip
    return Advice(
        candidate=candidate, ttft_mean_s=0.1, ttft_p99_s=0.2, tpot_mean_s=0.01, tpot_p99_s=0.02, end_mean_s=end,
        good_per_s=good * 4, good_share=good, gpu_s=math.inf if not good else 1 / good, failed=failed, split_share=0.0,
        why="",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (advice(good=0.9, end=9.0), advice(good=0.5, end=1.0)),
        (advice(good=0.9, end=1.0), advice(good=0.9, end=2.0)),
        (advice(good=0.898, end=1.0), advice(good=0.9, end=2.0)),
        (advice(good=0.2), advice(good=1.0, failed=1)),
    ],
)
def test_the_best_shape_keeps_the_bounds_most_often_and_then_ends_soonest(better, worse):
    assert rank([worse, better]) == [better, worse]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (advice((4, 4)), "answers of 4 GPUs"),
        (advice((1, 1)), "answers of one GPU"),
        (advice((2, 2), expert=False), "each of which reads 1/2 of each expert"),
        (advice((2, 2), tensor=2, expert=False), "each of which reads 1/4 of each expert; 2 GPUs compute each prompt"),
        (advice((2, 2, 2), prefill=1, pairs=True), "prompts on 2 GPUs hold up no answer; answers share 4 GPUs"),
        (
            advice((2, 2), pairs=True, moves=True, begin=1),
            "1 of 2 servers began for prompts, 25% of the requests split",
        ),
        (advice((4,), redundant=4), "4 copies of experts"),
    ],
)
def test_the_reason_names_the_answers_that_a_prompt_holds_up(row, words):
    assert words in explain(row.candidate, 0.25, 0)
    assert "3 preemptions" in explain(row.candidate, 0.25, 3)


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_fits_and_says_that_it_is_modelled_and_which_shape_is_the_files(width):
    row = replace(advice(roles="{prefill: 1, decode: 1}"), why="prompts hold up no answer")
    words = "2 of tensor 2 x data 2, experts spread"
    present = replace(row, candidate=replace(row.candidate, is_present=True, servers=words))
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(render([row, present], [], BOUNDS, "Step times: fitted to a clock.", width=width))
    text = console.export_text()
    assert "\N{HORIZONTAL ELLIPSIS}" not in text, "nothing is cut"
    words = " ".join(text.split())
    for part in ("spread *", "Modelled, not measured", "Step times: fitted to a clock.", "100, 200", "10.0, 20.0"):
        assert part in words
    assert ("1, 2: prompts hold up no answer." in words) == (width == 80)
    assert words.count("prompts hold up no answer") == (1 if width == 80 else 2)
    assert "copies" not in text


def test_a_figure_that_is_infinite_is_null_in_json():
    document = to_document(advice(good=0.0))
    assert document["gpu_s"] is None
    assert json.loads(json.dumps(document))["good_per_s"] == 0.0


def test_redundant_experts_even_the_ranks_out():
    clock = RooflineClock(preset=PRESETS["h100-qwen3-30b-a3b"])
    load = FleetLoad(clock=clock, trace=(), max_model_len=4096)
    plain, copies = (
        build_fleet(FleetShape(servers=(4,), redundant=redundant), load).fleet[0].cost.balance.slowest
        for redundant in (0, 4)
    )
    assert 1.0 <= copies < plain


def test_errors_of_the_command_are_lines_with_status_2(resource):
    done = runner.invoke(app, ["advise", "-f", str(resource()), "--rate", "4", "--output", "xml"])
    assert (done.exit_code, done.output.strip()) == (2, "--output: unknown 'xml'; known: json, table")


def test_the_log_of_vllm_is_no_part_of_the_advice(resource, monkeypatch):
    logger = logging.getLogger("moe_tools.test.vllm")

    def simulate_loudly(question):
        print("loaded")
        # As vLLM does when it is imported.
        logger.addHandler(logging.StreamHandler(sys.stdout))
        logger.warning("enforce eager")
        return [advice()]

    monkeypatch.setattr(advisor, "_simulate_all", simulate_loudly)
    done = runner.invoke(app, ["advise", "-f", str(resource()), "--rate", "4", "--output", "json"])
    logger.handlers.clear()
    assert json.loads(done.stdout)["shapes"][0]["roles"] == "unified"
    assert "loaded" in done.stderr
    assert "eager" not in done.output
    assert logger.isEnabledFor(logging.WARNING)


@pytest.mark.timeout(900)
def test_a_whole_run_prints_every_shape_as_json(resource):
    path = resource(replicas=2, args=["--max-model-len=4096"])
    done = runner.invoke(
        app,
        ["advise", "-f", str(path), "--rate", "8", "--requests", "20", "--answer-tokens", "4", "--output", "json"],
    )
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["model_error"] == MODEL_ERROR
    shapes = document["shapes"]
    assert [row["is_present"] for row in shapes].count(True) == 1
    assert {row["roles"] for row in shapes} == {"unified", "auto", "{prefill: 1, decode: 1}"}
    assert [" servers began for prompts" in row["why"] for row in shapes] == [row["roles"] == "auto" for row in shapes]
    # Four shapes, and other steps of the best.
    assert len(shapes) in (6, 7)
    assert [row["gpus"] for row in shapes] == [2] * len(shapes)
    assert all(row["failed"] == 0 and row["ttft_mean_s"] > 0 for row in shapes)
