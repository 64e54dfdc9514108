"""Measured engine steps: what a table says of prompts and answers, and presets fitted to it."""

import csv
import gzip
import itertools
import statistics

import pytest
from moe_contract.input_errors import InvalidInput
from moe_lab.step_times import __main__ as command
from moe_lab.step_times.evaluation import fit_preset, group_runs, preset_errors
from moe_lab.step_times.kernels import compose_preset, list_engines
from moe_lab.step_times.records import StepRecord, engine_of, measurements_of, read_records
from moe_tools.calibration.preset_errors import COMPOSED, PRESET_ERRORS, describe_errors, parse_errors
from moe_tools.calibration.step_errors import StepKind
from moe_tools.calibration.step_fit import predict
from moe_tools.simulator.fitted_presets import FITTED_PRESETS, parse_presets
from typer.testing import CliRunner

TP2 = "qwen36_moe_20260101/tp2_ep2"
DP4 = "qwen36_dp_20260101/tp1_ep4"
COLUMNS = (
    *("run", "phase", "segment", "counter", "dp_rank", "prefill_tokens", "prefill_reqs", "prefill_kv_tokens"),
    *("decode_reqs", "decode_kv_tokens", "queued_prefill_reqs", "queued_prefill_tokens", "queued_decode_reqs"),
    "latency_ms",
)


def record(counter, prefill=0, decode=0, seconds=0.01, *, run=TP2, requests=1, before=0, context=100):
    return StepRecord(
        run=run,
        counter=counter,
        prefill_tokens=prefill,
        prefill_requests=requests if prefill else 0,
        prefill_context=before,
        decode_requests=decode,
        decode_context=context * decode,
        seconds=seconds,
    )


@pytest.mark.parametrize(
    ("run", "preset", "ranks", "ahead"),
    [
        ("qwen36_moe_2026/tp2_ep1", "b300-qwen3.6-35b-a3b-tp2-ep1", 1, True),
        ("qwen36_dp_ep_2026/tp2_dp_ep/tp2_ep8", "b300-qwen3.6-35b-a3b-tp2-ep8-dp4", 4, False),
        ("dsv4_flash_tp1_ep4_dp4_online2_2026", "b300-deepseek-v4-flash-tp1-ep4-dp4", 4, False),
        ("dsv4_flash_tp2_tp4_ep4_2026/tp4_ep4", "b300-deepseek-v4-flash-tp4-ep4", 1, False),
    ],
)
def test_the_name_of_a_run_tells_model_and_parallelism(run, preset, ranks, ahead):
    engine = engine_of(run)
    assert (engine.preset, engine.model.ranks, engine.launches_ahead) == (preset, ranks, ahead)


@pytest.mark.parametrize("run", ["llama_tp1_ep1", "qwen36_moe_2026"])
def test_other_names_tell_nothing(run):
    assert engine_of(run) is None


def test_a_prompt_takes_its_chunks_and_what_the_step_before_it_took_too_long():
    steps = [
        *[record(number, decode=1) for number in range(5)],
        record(5, decode=1, seconds=0.05),
        record(6, prefill=3168, seconds=0.08),
        record(7, prefill=928, before=3168, seconds=0.001),
        record(8, decode=2),
    ]
    rows = measurements_of(engine_of(TP2), steps)
    assert [row.shape for row in rows[:-1]] == ["decode 1"] * 5 + ["decode 2"]
    assert rows[-1].seconds == pytest.approx(0.08 + 0.001 + 0.04)
    assert [works[0].prefill_tokens for works in rows[-1].steps] == [3168, 928]
    assert rows[-1].steps[1][0].prefill_pairs == 928 * (464 + 3168)
    assert rows[-1].weight == pytest.approx(6.0)


def test_prompts_one_after_another_are_apart_and_mixed_bursts_together():
    alone = [record(number, prefill=128) for number in range(3)]
    assert len(measurements_of(engine_of(TP2), alone)) == 3
    mixed = [record(0, prefill=128), record(1, prefill=128, decode=1)]
    assert len(measurements_of(engine_of(TP2), mixed)) == 1


def test_steps_with_a_gap_between_them_are_two_bursts():
    assert len(measurements_of(engine_of(TP2), [record(0, prefill=99, decode=1), record(2, prefill=99, decode=1)])) == 2


def test_ranks_that_are_not_in_the_table_are_taken_as_they_are_likely():
    engine = engine_of(DP4)
    (decode,) = measurements_of(engine, [record(0, decode=3, run=DP4)])
    assert decode.steps[0] == (decode.steps[0][0],) * 4
    (one,) = measurements_of(engine, [record(0, prefill=500, decode=3, run=DP4)])
    assert [work.prefill_tokens for work in one.steps[0]] == [500, 0, 0, 0]
    (several,) = measurements_of(engine, [record(0, prefill=500, requests=2, run=DP4)])
    assert [work.prefill_tokens for work in several.steps[0]] == [500] * 4


@pytest.mark.parametrize(("context", "compressions"), [(127, 1), (128, 0), (255, 1)])
def test_a_compressed_piece_is_known_for_a_request_alone(context, compressions):
    run = "dsv4_flash_x/tp4_ep4"
    (row,) = measurements_of(engine_of(run), [record(0, decode=1, context=context, run=run)])
    assert row.steps[0][0].compressions == compressions
    (row,) = measurements_of(engine_of(run), [record(0, decode=2, context=context, run=run)])
    assert row.steps[0][0].compressions == 0


def write_table(path, runs=(TP2,)):
    """A table of an engine of which a decode step takes 4 ms and 0.1 more a token, a prompt 20 us a token."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval=0)
        writer.writeheader()
        for run in runs:
            for counter in range(240):
                batch = counter % 16 + 1
                padded = {1: 1, 2: 2, 3: 4, 4: 4}.get(batch, 8 if batch <= 8 else 16)
                row = {"run": run, "counter": counter, "decode_reqs": batch, "decode_kv_tokens": 100 * batch}
                writer.writerow({**row, "latency_ms": 4 + 0.1 * padded})
            for counter in range(240, 280):
                tokens = 600 + 100 * (counter - 240)
                row = {"run": run, "counter": counter, "prefill_tokens": tokens, "prefill_reqs": 1}
                writer.writerow({**row, "latency_ms": 20 + 0.02 * tokens})
    return path


def test_a_preset_fits_the_table_and_survives_its_file(tmp_path):
    (measured,) = group_runs(read_records(write_table(tmp_path / "steps.csv"))).values()
    assert measured.held_out == "shapes"
    errors = preset_errors(measured, fit_preset(measured))
    assert [row.measurements for row in errors] == [239, 40]
    assert all(row.median < 0.03 for row in errors)


def test_runs_of_one_engine_are_held_out_as_wholes(tmp_path):
    runs = [f"qwen36_{name}/tp2_ep2" for name in "ab"]
    (measured,) = group_runs(read_records(write_table(tmp_path / "steps.csv", runs))).values()
    assert measured.held_out == "runs"
    assert sorted(set(measured.folds())) == [0, 1]


def test_batch_sizes_of_one_graph_are_held_out_together_where_asked_for(tmp_path):
    (measured,) = group_runs(read_records(write_table(tmp_path / "steps.csv"))).values()
    rows = measured.measurements
    for whole_graphs, folds_of_the_graph in ((False, 5), (True, 1)):
        folds = measured.folds(whole_graphs=whole_graphs)
        of_graph = {fold for row, fold in zip(rows, folds, strict=True) if 8 < row.steps[0][0].decode_requests <= 16}
        assert len(of_graph) == folds_of_the_graph


def test_the_command_fits_prints_errors_and_compares_committed_presets(tmp_path):
    table, out, document = write_table(tmp_path / "steps.csv"), tmp_path / "out.csv", tmp_path / "errors.json"
    runner = CliRunner()
    result = runner.invoke(command.app, ["fit", str(table), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert list(parse_presets(out.read_text())) == ["b300-qwen3.6-35b-a3b-tp2-ep2"]
    result = runner.invoke(command.app, ["errors", str(table), "--json", str(document)])
    assert "shapes held out" in result.output
    assert document.exists()
    result = runner.invoke(command.app, ["errors", str(table), "--whole-graphs"])
    assert result.exit_code == 0, result.output
    result = runner.invoke(command.app, ["errors", str(table), "--as-committed"])
    assert "b300-qwen3.6-35b-a3b-tp2-ep2" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["errors", "nowhere.csv"], "nowhere.csv: no such file"),
        (["errors", "TABLE", "--preset", "b300-x"], "--preset: unknown 'b300-x'; known: b300-qwen3.6-35b-a3b-tp2-ep2"),
        (["errors", "OTHER"], "no table of measured steps"),
        (["errors", "EMPTY"], "has no steps"),
        (["errors", "ALIKE"], "b300-qwen3.6-35b-a3b-tp2-ep2: has steps of one shape alone"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, arguments, message):
    write_table(tmp_path / "TABLE")
    (tmp_path / "OTHER").write_text("a,b\n1,2\n")
    (tmp_path / "EMPTY").write_text(",".join(COLUMNS) + "\n")
    alike = [f"{TP2},,,{counter},0,0,0,0,1,100,0,0,0,10.0" for counter in range(60)]
    (tmp_path / "ALIKE").write_text("\n".join([",".join(COLUMNS), *alike]) + "\n")
    arguments = [str(tmp_path / word) if word.isupper() else word for word in arguments]
    result = CliRunner().invoke(command.app, arguments)
    assert result.exit_code == 2
    assert message in result.output


def write_kernels(folder, layer_ms=0.1):
    """Tables of kernels that all take a time and a millisecond for each 1,000 tokens more."""
    sizes = [1, 8, 64, 512, 4096, 65536]
    expected = "model_shape,kernel,dtype,hidden,inter,topk,experts,moe_tp,moe_ep,distribution,num_tokens,latency_ms"
    for gpu in ("h100", "h200"):
        with gzip.open(folder / f"moe_kernel_{gpu}_vllm0.24.csv.gz", "wt") as file:
            file.write(f"{expected}\n")
            for shape, dtype, distribution in (
                ("Qwen3-30B-A3B", "bfloat16", "balanced"),
                ("DeepSeek-V3/R1", "fp8_block", "power_law_1.01"),
            ):
                for ranks, size in itertools.product((1, 2, 4, 8, 16), sizes):
                    latency_ms = layer_ms + size / 1000 / ranks
                    file.write(f"{shape},k,{dtype},0,0,8,128,1,{ranks},{distribution},{size},{latency_ms}\n")
    rows = [f"k,{ranks},{2**power},0.01,{kind}" for ranks in (2, 4, 8) for power in range(7, 30) for kind in KINDS]
    (folder / "allreduce_h200_vllm.csv").write_text(
        "\n".join(["# c", "k,num_gpus,message_size,latency,backend", *rows])
    )
    known = "hidden_size,num_token,num_topk,num_experts"
    low = [f"7168,{size},8,256,10,20" for size in sizes]
    (folder / "deepep_ll_h200.csv").write_text("\n".join([f"{known},combine_avg_t_us,dispatch_avg_t_us", *low]))
    normal = [f"7168,{size},8,256,{sms},100,{sms},200" for size in sizes for sms in (20, 24)]
    columns = f"{known},dispatch_sms,dispatch_transmit_us,combine_sms,combine_transmit_us"
    (folder / "deepep_normal_h200.csv").write_text("\n".join([columns, *normal]))


KINDS = ("vllm_graph", "vllm_eager")


def test_steps_are_composed_of_kernels_and_fitted(tmp_path):
    write_kernels(tmp_path)
    engines = {engine.preset: engine for engine in list_engines()}
    assert {"h100-qwen3-30b-a3b-kernels-dp1", "h200-deepseek-v3-kernels-dp8"} < set(engines)
    for name in ("h200-qwen3-30b-a3b-kernels-dp2", "h200-deepseek-v3-kernels-dp8", "h100-deepseek-v3-kernels-dp16"):
        preset, steps = compose_preset(engines[name], tmp_path)
        assert preset.source.startswith("modelled from kernels")
        errors = [abs(predict(preset.model, preset.coefficients, step) / step.seconds - 1) for step in steps]
        assert statistics.median(errors) < 0.1
        layers = engines[name].model.moe_layers
        assert min(step.seconds for step in steps) > layers * 1e-4


def test_errors_of_measured_and_composed_steps_are_one_table(tmp_path):
    write_kernels(tmp_path)
    with gzip.open(tmp_path / command.STEPS, "wt") as file:
        write_table(tmp_path / "steps.csv")
        file.write((tmp_path / "steps.csv").read_text())
    result = CliRunner().invoke(command.app, ["errors", str(tmp_path), "--csv", str(tmp_path / "errors.csv")])
    assert result.exit_code == 0, result.output
    errors = parse_errors((tmp_path / "errors.csv").read_text())
    assert {row.compared for row in errors["b300-qwen3.6-35b-a3b-tp2-ep2"]} == {"held-out shapes"}
    assert {row.compared for row in errors["h200-qwen3-30b-a3b-kernels-dp2"]} == {COMPOSED}
    assert set(errors) == {"b300-qwen3.6-35b-a3b-tp2-ep2", *(engine.preset for engine in list_engines())}


def test_the_table_of_errors_needs_all_steps(tmp_path):
    table = tmp_path / "steps.csv"
    write_table(table)
    result = CliRunner().invoke(command.app, ["errors", str(table), "--csv", str(tmp_path / "errors.csv")])
    assert (result.exit_code, "--csv: takes the folder" in result.output) == (2, True)


def test_the_package_has_the_errors_of_each_preset():
    assert set(PRESET_ERRORS) == set(FITTED_PRESETS)
    for name, rows in PRESET_ERRORS.items():
        assert {row.kind for row in rows} == set(StepKind)
        assert all(0 <= row.median <= row.p90 for row in rows)
        assert ("compared with no engine" in describe_errors(name)) == ("kernels" in name)


def test_slower_kernels_make_longer_steps(tmp_path):
    engine = next(engine for engine in list_engines() if engine.ranks == 2)
    seconds = []
    for layer_ms in (0.1, 0.2):
        write_kernels(tmp_path, layer_ms)
        seconds.append([step.seconds for step in compose_preset(engine, tmp_path)[1]])
    assert all(slow > fast for fast, slow in zip(*seconds, strict=True))


def test_a_missing_table_of_kernels_is_named(tmp_path):
    with pytest.raises(InvalidInput, match="no table of kernels"):
        compose_preset(next(list_engines()), tmp_path)


def test_unknown_runs_are_named():
    with pytest.raises(InvalidInput, match="no name of a known model"):
        group_runs({"other": [record(0, decode=1)]})
