"""Presets from measured steps, and their errors on steps that they were not fitted on."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from moe_contract.input_errors import InputError, InvalidInput
from moe_tools.calibration.step_errors import ErrorRow, StepKind, by_shape, cross_validate, kind_of, summarize
from moe_tools.calibration.step_fit import StepMeasurement, fit_coefficients, predict
from moe_tools.simulator.fitted_presets import FittedPreset

from moe_lab.step_times.records import MeasuredEngine, StepRecord, engine_of, measurements_of

SOURCE = "measured: vLLM 0.20.1, GPU inferred to be B300 (ai-dynamo/aiconfigurator abbac647)"
# KV bytes of a token: Qwen3.6-35B-A3B has 10 layers of full attention, 2 KV heads of 256, BF16. DeepSeek-V4-Flash's
# compressed cache has no published size a token: as many as its trace had at once, and a third more (assumed).
_QWEN_KV_BYTES, _QWEN_WEIGHT_BYTES, _B300_BYTES, _USED = 2 * 2 * 256 * 2 * 10, 70e9, 288e9, 0.9
_DEEPSEEK_BLOCKS = 16_384


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRuns:
    """Measured runs of one engine.

    Attributes:
        engine: that made them.
        runs: measurements by the name of the run.
    """

    engine: MeasuredEngine
    runs: Mapping[str, Sequence[StepMeasurement]]

    @property
    def measurements(self) -> list[StepMeasurement]:
        """All measurements of all runs."""
        return [row for rows in self.runs.values() for row in rows]

    def folds(self, *, whole_graphs: bool = False) -> list[int]:
        """Returns the fold of each measurement: whole runs where there are several, else whole shapes.

        Args:
            whole_graphs: all batch sizes that one captured CUDA graph serves are one shape.
        """
        if len(self.runs) > 1:
            return [number for number, rows in enumerate(self.runs.values()) for _ in rows]
        return by_shape([self._by_graph(row) for row in self.measurements] if whole_graphs else self.measurements)

    def _by_graph(self, row: StepMeasurement) -> StepMeasurement:
        if kind_of(row) is not StepKind.DECODE:
            return row
        return replace(row, shape=f"decode {self.engine.model.padded(row.steps[0][0].decode_requests)}")

    @property
    def held_out(self) -> str:
        """Name of the parts that are held out whole."""
        return "runs" if len(self.runs) > 1 else "shapes"


def group_runs(records: Mapping[str, Sequence[StepRecord]]) -> dict[str, MeasuredRuns]:
    """Returns the runs of each engine, by the name of its preset.

    Raises:
        InvalidInput: no run has a name that is known.
    """
    engines: dict[str, MeasuredEngine] = {}
    runs: dict[str, dict[str, list[StepMeasurement]]] = defaultdict(dict)
    for run, steps in records.items():
        if (engine := engine_of(run)) is not None and (rows := measurements_of(engine, steps)):
            engines[engine.preset] = engine
            runs[engine.preset][run] = rows
    if not engines:
        names = ", ".join(sorted(records))
        raise InvalidInput([InputError("run", f"no name of a known model with its parallelism among: {names}")])
    return {name: MeasuredRuns(engine=engines[name], runs=runs[name]) for name in sorted(engines)}


def fit_preset(measured: MeasuredRuns) -> FittedPreset:
    """Returns the preset fitted to all runs of an engine."""
    rows = measured.measurements
    return FittedPreset(
        model=measured.engine.model,
        coefficients=fit_coefficients(measured.engine.model, rows),
        kv_blocks=_kv_blocks(measured.engine),
        measurements=len(rows),
        source=SOURCE,
    )


def _kv_blocks(engine: MeasuredEngine) -> int:
    """Returns blocks of 16 tokens in the memory that the weights leave; KV heads are split over two ranks at most."""
    if engine.compresses:
        return _DEEPSEEK_BLOCKS
    weights = _QWEN_WEIGHT_BYTES / max(engine.tensor_ranks, engine.model.expert_ranks)
    return int((_B300_BYTES * _USED - weights) / (_QWEN_KV_BYTES / min(engine.tensor_ranks, 2)) / 16)


def cross_errors(measured: MeasuredRuns, *, whole_graphs: bool = False) -> tuple[ErrorRow, ...]:
    """Returns the errors on held-out runs or shapes.

    Args:
        measured: all runs of an engine.
        whole_graphs: all batch sizes that one captured CUDA graph serves are held out together.

    Raises:
        InvalidInput: there is one run with steps of one shape alone.
    """
    rows = measured.measurements
    folds = measured.folds(whole_graphs=whole_graphs)
    if len(set(folds)) < 2:
        raise InvalidInput([InputError(measured.engine.preset, "has steps of one shape alone, none to hold out")])
    return summarize(rows, cross_validate(measured.engine.model, rows, folds))


def preset_errors(measured: MeasuredRuns, preset: FittedPreset) -> tuple[ErrorRow, ...]:
    """Returns the errors of a preset as it is."""
    rows = measured.measurements
    return summarize(rows, [predict(preset.model, preset.coefficients, row) for row in rows])
