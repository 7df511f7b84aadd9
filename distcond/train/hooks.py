"""What happens beside training: stop requests, metrics, validation, checkpoints, profiles."""

import contextlib
import logging
import time

import torch

from distcond.config import TrainConfig
from distcond.config.cost import ModelCost
from distcond.errors import TrainingError
from distcond.nn.model import SUMS
from distcond.tracking import Tracker
from distcond.train.metrics import Meter, is_better, mean_loss, ponder, quality, tree_usage
from distcond.train.run_folder import is_there, write_json
from distcond.train.samples import first_answer, samples_of
from distcond.train.schedule import learning_rate
from distcond.train.state import Run, validate
from distcond.train.table_files import own_tables
from distcond.train.tree_use import nodes_in_use

log = logging.getLogger(__name__)

LONGEST_WAIT_S = 60.0
"For a checkpoint that is still being written when the next one is due."
LAST_LIMIT_S, STOP_LIMIT_S = 120.0, 4.0
"For the last checkpoint to be written, attempts after failures included; after a request to stop."
RETRY_S = 1.0
"Between such attempts."
PROFILED_STEPS = range(5, 10)
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L4": 121.0, "V100": 125.0, "T4": 65.0}
"Dense bf16 (or fp16) peaks of GPUs from their data sheets."


class StopHook:
    """Ends the run after this step, on all ranks at once, when somebody created RUN/stop."""

    def after_step(self, run: Run) -> None:
        """Agree on whether to stop, and on what has become of the checkpoint that is being written."""
        run.stop = run.writer.agree(is_there(run.folder.stop_file))

    def close(self) -> None:
        """Nothing to do."""


class LogHook:
    """Training metrics every `train.log_every` steps, and at the end."""

    def __init__(self, tracker: Tracker | None, cost: ModelCost, peak_tflops: float | None, bytes_per_token: float = 1.0) -> None:
        self.tracker, self.cost, self.peak_tflops, self.bytes_per_token = tracker, cost, peak_tflops, bytes_per_token

    def after_step(self, run: Run) -> None:
        """Pool the window over ranks and write a row."""
        if run.step % run.config.train.log_every and not run.is_last:
            return
        world, expert = run.engine.tables.world, run.engine.tables.expert
        sums = world.sum_(run.meter.sums)
        row: dict[str, float] = {"step": run.step}
        figures = quality(sums, is_text=run.learner.is_text, prefix="train", bytes_per_token=self.bytes_per_token)
        pondering = ponder(sums)
        row["train/loss"] = mean_loss(sums, run.learner)
        if run.budget is not None:
            row["ponder/penalty"] = run.budget.penalty
        row |= figures | pondering | tree_usage(run.learner, world, expert, run.tree_use.add)
        performance = run.meter.performance(expert, float(sums[SUMS.index("positions")]))
        if self.peak_tflops:
            flops = 6 * self.cost.macs(pondering["ponder/steps"]) * performance["perf/tokens_per_s"]
            performance["perf/mfu"] = flops / (self.peak_tflops * 1e12 * world.size)
        lr = learning_rate(run.config.optim, run.step - 1, run.config.train.max_steps)
        row |= performance | {"optim/lr": lr, "optim/grad_norm": run.engine.grad_norm}
        row["optim/skipped_steps"] = run.meter.skipped
        if self.tracker:
            self.tracker.log(row)
        run.meter = Meter(exchange_s=expert.elapsed_s)

    def close(self) -> None:
        """Finish the tracker."""
        if self.tracker:
            self.tracker.close()


class ValidationHook:
    """Validation every `train.eval_every` steps, and after the last; keeps the best figure.

    Whoever asks for a stop waits for a checkpoint, not for a validation that would not be due, nor for one that takes long.
    """

    def __init__(self, tracker: Tracker | None, bytes_per_token: float = 1.0) -> None:
        self.tracker, self.bytes_per_token = tracker, bytes_per_token

    def after_step(self, run: Run) -> None:
        """Validate and write a row."""
        if run.step % run.config.train.eval_every and not run.is_complete:
            return
        with run.meter.paused(run.engine.tables.expert):
            self._validate(run)

    def close(self) -> None:
        """Nothing to do."""

    def _validate(self, run: Run) -> None:
        start = time.perf_counter()
        with first_answer(run.learner) as seen:
            sums = validate(run)
        if sums is None:
            return
        figures = quality(sums, is_text=run.learner.is_text, prefix="val", bytes_per_token=self.bytes_per_token)
        figures |= ponder(sums, "val/ponder")
        row: dict[str, float] = {"step": run.step, **figures, "perf/validation_s": time.perf_counter() - start}
        metric = "val/bpb" if run.learner.is_text else "val/sequence_error"
        run.validation = (run.step, figures[metric])
        if is_better(figures[metric], run.summary.get("best")):
            run.summary["best"] = {"metric": metric, "value": figures[metric], "step": run.step}
        run.summary["last"] = figures
        trees = nodes_in_use(run.tree_use, run.engine) if run.config.tracking.samples else []
        if self.tracker:
            if samples := samples_of(run.learner, seen, run.config.tracking.samples):
                self.tracker.log_samples(run.step, samples)
            if trees:
                self.tracker.log_trees(run.step, trees)
            self.tracker.log(row)


class CheckpointHook:
    """Checkpoints every `checkpoint.every` steps, and at the end, written while training goes on; the summary with each.

    None while steps are left out in a row: what was saved before them may be better.
    """

    def after_step(self, run: Run) -> None:
        """Take a copy of the state; at the end, see it written."""
        is_due = run.step % run.config.checkpoint.every == 0 and not run.bad_steps
        if not (is_due or run.writer.retry_is_due or run.is_last):
            return
        with run.meter.paused(run.engine.tables.expert):
            self._save(run)

    def close(self) -> None:
        """Nothing to do."""

    def _save(self, run: Run) -> None:
        if run.writer.settle(STOP_LIMIT_S if run.stop else LONGEST_WAIT_S):
            self._begin(run)
        elif run.engine.tables.world.rank == 0:
            run.note(f"The checkpoint before step {run.step} is still being written; that of step {run.step} is left out.")
        if run.is_last:
            self._finish(run)
        elif run.engine.tables.world.rank == 0:
            with contextlib.suppress(OSError):  # a disk that is full costs no run; at the end it is written for certain
                write_json(run.folder.summary_file, run.summary)

    def _begin(self, run: Run) -> None:
        run.summary.update(step=run.step, stopped=run.stop and not (run.is_complete and run.is_validated))
        step, value = run.validation or (None, None)
        run.writer.begin(
            run.step,
            dense=run.engine.dense_state() | run.engine.buffers(),
            tables=own_tables(run.learner, run.engine.tables),
            state={
                "updates": run.updates,
                "budget": run.budget and run.budget.state_dict(),
                "summary": run.summary,
                "validation": value if step == run.step else None,
                "world_size": run.engine.tables.world.size,
                "threads": torch.get_num_threads(),
            },
        )

    def _finish(self, run: Run) -> None:
        """Wait until the last state is on the disk. Raises TrainingError where that cannot be had."""
        limit, rank = STOP_LIMIT_S if run.stop else LAST_LIMIT_S, run.engine.tables.world.rank
        end = time.monotonic() + limit
        while not (run.writer.settle(limit) and run.writer.newest == run.step):
            if run.writer.failure:
                time.sleep(min(RETRY_S, limit))
            elif not run.writer.is_busy:  # the one before has ended at last
                end = time.monotonic() + limit
            if run.writer.agree(rank == 0 and time.monotonic() > end):
                reason = run.writer.failure or f"not written within {limit:g} s"
                raise TrainingError(
                    f"the last checkpoint, of step {run.step}, could not be written: {reason}. Once there is room, the same "
                    "command goes on from the newest one."
                )
            if not run.writer.is_busy:
                self._begin(run)
        if rank == 0:
            write_json(run.folder.summary_file, run.summary)


class ProfileHook:
    """A torch profiler trace of PROFILED_STEPS, one file a rank, in RUN/logs/profile."""

    def __init__(self) -> None:
        self.profiler: torch.profiler.profile | None = None

    def after_step(self, run: Run) -> None:
        """Start before the first profiled step, write after the last."""
        if run.step + 1 == PROFILED_STEPS.start:
            self.profiler = torch.profiler.profile()
            self.profiler.start()
        elif self.profiler and (run.step + 1 == PROFILED_STEPS.stop or run.is_last):
            self.profiler.stop()
            folder = run.folder.logs / "profile"
            folder.mkdir(parents=True, exist_ok=True)
            self.profiler.export_chrome_trace(str(folder / f"rank_{run.engine.tables.world.rank}.json"))
            self.profiler = None

    def close(self) -> None:
        """Stop a profiler that training left running."""
        if self.profiler:
            self.profiler.stop()


def peak_tflops(train: TrainConfig) -> float | None:
    """Peak of this process's device: the configured one, else a known GPU's, else None."""
    if train.peak_tflops is not None or not torch.cuda.is_available():
        return train.peak_tflops
    name = torch.cuda.get_device_name()
    return next((peak for key, peak in PEAK_TFLOPS.items() if key in name), None)
