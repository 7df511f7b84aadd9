"""What `distcond evaluate` measures of a run, put together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from distcond.config import HaltingKind
from distcond.data.batch import Batch
from distcond.data.generated import GeneratedTask
from distcond.data.places import PLACES, places_of
from distcond.data.tasks import Task, TextTask, bytes_per_token
from distcond.evaluate.against import check_comparable, compare
from distcond.evaluate.chance import steps_beside_chance
from distcond.evaluate.forced import forced, numbers_to_try
from distcond.evaluate.latency import BATCHES, Calls, forget_peak, latencies, peak_gib
from distcond.evaluate.quality import Quality, by_group, difficulty, hardest, rare
from distcond.evaluate.seen import PerExample, Seen, look
from distcond.evaluate.touched import bytes_touched
from distcond.evaluate.upkeep import upkeep
from distcond.opened import OpenedRun, open_run, threads
from distcond.ops import kernels, use_kernels
from distcond.train.checkpoint import read_state
from distcond.train.fits import cost_of
from distcond.train.metrics import ponder, quality
from distcond.train.run_folder import check_writable, write_json

DECIDING = (HaltingKind.act, HaltingKind.ponder)
"Halting by which the number of steps is each input's own."


def evaluate(run: Path, step: int | None = None, against: Path | None = None) -> dict[str, Any]:
    """Quality, cost, latency and upkeep of a run, with controls; also written to RUN/eval/step_<N>.json.

    Keys are flat; q is the quality, val/bpb or val/sequence_error.
    {q}/low, /high (`Quality.interval`), /hardest_tenth, /worst_tenth (`hardest`; by `hardest_by`), /rare_leaves (`rare`)
    val/ponder/steps, steps_p50, steps_p95, steps_histogram: share of the positions that take 1, 2, ... steps
    macs_per_position, macs_per_example, bytes_touched_per_example (`bytes_touched`), peak_memory_gib (`peak_gib`)
    latency_ms/..., throughput_per_s (`latencies`): on this machine's processors, with as many `threads` as a rank of the run had
    maintainability/... (`upkeep`)
    control/fixed_steps, where each input chooses its steps: quality of the checkpoint if all take N, by N (`ForcedComputation`)
    control/steps_..., there: whether steps follow difficulty (`steps_beside_chance`)
    val/{group}/steps, under halting: by what an element has more or less of (gates, digits); of bytes also share and bits, by the
    place of the byte that is predicted (`places_of`)
    against, against/...: another run beside it (`compare`)

    step: which checkpoint; None: the newest. against: another run, whose newest checkpoint is measured in the same way, timed in
    turn with this one, see `compare`. Raises RunError where there is no run or no such checkpoint, or the two cannot be compared.
    """
    opened = [_open(run, step)]
    if against is not None:
        opened.append(_open(against, None))
        check_comparable(opened[0].run, opened[1].run)
    folder = opened[0].run.folder.path / "eval"
    check_writable(folder, "its figures are kept there; copy the run to where you may write.")
    with threads(int(read_state(opened[0].run.checkpoint).get("threads", 1))):
        measured = [_measure(one) for one in opened]
        times = latencies([one.calls for one in measured], measured[0].mean_length)
    for one, own in zip(measured, times, strict=True):
        one.figures.update(own)
    first, *others = measured
    result = dict(first.figures)
    for other in others:
        result |= compare(first.figures, other.figures, first.quality, other.quality)
    folder.mkdir(exist_ok=True)
    write_json(folder / f"step_{opened[0].run.step:08d}.json", result)
    return result


class _Opened(NamedTuple):
    run: OpenedRun
    kernels: str
    "What computes it here; opening another run chooses others."


@dataclass(frozen=True, slots=True)
class _Measured:
    """What is known of a run before it is timed."""

    figures: dict[str, Any]
    quality: Quality
    calls: Calls
    mean_length: float
    "Positions of an example."


def _open(run: Path, step: int | None) -> _Opened:
    return _Opened(open_run(run, step), kernels())


def _measure(opened: _Opened) -> _Measured:
    """Everything but latency, whose calls are warmed up here, so that memory is known."""
    run, chosen = opened
    config, learner, task = run.config, run.learner, run.feeder.task
    use_kernels(chosen)
    forget_peak()
    hardest_by, mark = difficulty(task)
    names, group = _groups(task) if config.model.halting.kind != HaltingKind.none else ([], None)
    marks = {name: found for name, found in (("difficulty", mark), ("group", group)) if found is not None}
    marks |= {"distinct": _distinct} if learner.is_text else {}
    seen = look(learner, config, run.feeder, marks)
    per_token = bytes_per_token(task, "validation")
    judged = Quality.of(seen.positions, is_text=learner.is_text, bytes_per_token=per_token)
    figures = {
        "run": run.folder.path.resolve().name,
        "step": run.step,
        **quality(seen.sums, is_text=learner.is_text, prefix="val", bytes_per_token=per_token),
        **_quality(judged, seen, hardest_by),
        **_steps(seen),
        **_cost(run, seen),
    }
    calls = Calls(learner, task.validation_rows(0, min(max(BATCHES), config.data.validation_examples)), chosen)
    calls.warm()
    figures |= {"threads": torch.get_num_threads(), "kernels": chosen, "peak_memory_gib": peak_gib()}
    figures |= upkeep(run.folder, config, run.step, judged.name)
    if config.model.halting.kind in DECIDING:
        figures |= {"control/fixed_steps": _fixed(run, seen, per_token), **steps_beside_chance(seen.positions)}
    if group is not None:
        figures |= by_group(seen.positions, names, seen.marks["group"], is_text=learner.is_text)
    return _Measured(figures, judged, calls, _mean_length(seen))


def _quality(judged: Quality, seen: Seen, hardest_by: str) -> dict[str, Any]:
    positions, (low, high) = seen.positions, judged.interval()
    hard_E = seen.marks.get("difficulty", positions.entropy.sum(1))
    return {
        f"{judged.name}/low": low,
        f"{judged.name}/high": high,
        **hardest(judged, hard_E, positions.nll.sum(1)),
        "hardest_by": hardest_by,
        **rare(judged, seen.visits, positions.valid.shape[1]),
    }


def _steps(seen: Seen) -> dict[str, Any]:
    steps_N = seen.positions.steps[seen.positions.valid]
    p50, p95 = np.percentile(steps_N, [50, 95], method="inverted_cdf")
    histogram = (np.bincount(steps_N)[1:] / len(steps_N)).tolist()
    spread = {"val/ponder/steps_p50": int(p50), "val/ponder/steps_p95": int(p95), "val/ponder/steps_histogram": histogram}
    return ponder(seen.sums, "val/ponder") | spread


def _cost(run: OpenedRun, seen: Seen) -> dict[str, float]:
    macs = cost_of(run.config).macs(ponder(seen.sums)["ponder/steps"])
    figures = {"macs_per_position": macs, "macs_per_example": macs * _mean_length(seen)}
    distinct = float(seen.marks["distinct"].mean()) if "distinct" in seen.marks else 0.0
    touched = bytes_touched(run.learner.body, seen.visits, seen.positions.valid.shape[1], distinct)
    return figures if touched is None else figures | {"bytes_touched_per_example": touched}


def _fixed(run: OpenedRun, seen: Seen, per_token: float) -> dict[str, float]:
    """Quality of the checkpoint where every position takes N steps, by N."""
    steps_N, learner = seen.positions.steps[seen.positions.valid], run.learner
    found: dict[str, float] = {}
    for number in numbers_to_try(float(steps_N.mean()), int(steps_N.max())):
        with forced(learner.body, number):
            positions = look(learner, run.config, run.feeder).positions
        found[str(number)] = Quality.of(positions, is_text=learner.is_text, bytes_per_token=per_token).mean()
    return found


def _distinct(batch: Batch) -> np.ndarray:
    """Different bytes or tokens in each example."""
    ordered_BT = np.sort(batch.inputs, axis=1)
    return np.asarray(1 + (ordered_BT[:, 1:] != ordered_BT[:, :-1]).sum(1))


def _mean_length(seen: Seen) -> float:
    return float(seen.positions.valid.sum(1).mean())


def _groups(task: Task) -> tuple[list[str], PerExample | None]:
    """Names of what the elements of a task are told apart by, and the index of each one's: int64 [B, T]; None: by nothing."""
    if isinstance(task, TextTask) and task.unit == "bytes":
        names = [place.replace(" ", "_") for place in PLACES]
        return names, lambda batch: places_of(np.concatenate([batch.inputs[:, :1], batch.targets], axis=1))
    if isinstance(task, GeneratedTask) and task.measure:
        names = [f"{task.measure}_{amount:02d}" for amount in range(task.input_size + 1)]
        return names, lambda batch: task.measured(batch.inputs)
    return [], None
