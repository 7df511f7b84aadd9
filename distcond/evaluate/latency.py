"""How long a prediction takes, and what memory it needs. An example is a sequence of the validation set, whole, in one pass."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from distcond.bench.timing import milliseconds_in_turn
from distcond.data.batch import Batch
from distcond.nn.model import Learner
from distcond.ops import use_kernels
from distcond.train.state import tensors

BATCHES = (1, 32, 1024)
BUDGET_S = 2.0
"Seconds that each batch of a run is timed for, after a call or two."
MOST_REPEATS = 200
LONGEST_CALL_S = 10.0
"A batch is left out where a call is expected to take longer than this, from a smaller batch."
SHORT_S = 1.0
PERCENTILES = (50, 95, 99)


@dataclass(slots=True)
class Calls:
    """A model that is asked for batches of several sizes."""

    learner: Learner
    examples: Batch
    "As many as there are, up to the largest batch; a larger one repeats them."
    kernels: str
    "Those of the run; what is chosen holds for the whole process."
    batches: dict[int, Callable[[], object]] = field(default_factory=dict)
    "By size."
    seconds: dict[int, float] = field(default_factory=dict)
    "Of a call."

    @torch.no_grad()
    def warm(self) -> None:
        """Call each batch, from the smallest up, as far as that is quick enough."""
        self.batch(min(BATCHES))()  # what is set up by the first call of all, is not counted
        for smaller, size in zip((0, *BATCHES), BATCHES, strict=False):
            if smaller and self.seconds[smaller] * size / smaller > LONGEST_CALL_S:
                return
            self.batches[size] = self.batch(size)
            self.seconds[size] = _seconds(self.batches[size])

    def batch(self, size: int) -> Callable[[], object]:
        """A call of `size` examples."""
        index = np.arange(size) % len(self.examples.lengths)
        given = self.examples
        rows = Batch(given.inputs[index], given.targets[index], given.lengths[index], given.global_count)
        inputs, targets, lengths = tensors(rows, torch.device("cpu"))

        def call() -> object:
            use_kernels(self.kernels)
            return self.learner(inputs, targets, lengths)

        return call


@torch.no_grad()
def latencies(runs: Sequence[Calls], length: float) -> list[dict[str, float]]:
    """Of each run, warm, its batches timed in turn with those of the others; length: mean positions of an example.

    latency_ms/batch_32/p50, p95, p99: milliseconds of a whole batch, over as many repeats as BUDGET_S allows (.../repeats): of
    less than a hundred the p99 is close to the slowest, and a single one is the call that warmed up. throughput_per_s: examples,
    of the batch that is best at it, by p50; throughput_positions_per_s: their elements, e.g. bytes.
    """
    figures: list[dict[str, float]] = [{} for _ in runs]
    best = [0.0 for _ in runs]
    for size in BATCHES:
        timed = {str(index): run.batches[size] for index, run in enumerate(runs) if size in run.batches}
        taken_by = {name: [1e3 * runs[int(name)].seconds[size]] for name in timed}
        repeats = int(len(timed) * BUDGET_S / sum(run.seconds.get(size, 0.0) for run in runs)) if timed else 0
        if repeats > 1:
            taken_by = milliseconds_in_turn(timed, min(repeats, MOST_REPEATS))
        for name, taken in taken_by.items():
            index, at = int(name), {f"p{percent}": float(np.percentile(taken, percent)) for percent in PERCENTILES}
            figures[index] |= {f"latency_ms/batch_{size}/{key}": value for key, value in {**at, "repeats": len(taken)}.items()}
            best[index] = max(best[index], 1e3 * size / at["p50"])
    rates = [{"throughput_per_s": rate, "throughput_positions_per_s": rate * length} for rate in best]
    return [{**own, **rate} for own, rate in zip(figures, rates, strict=True)]


def _seconds(call: Callable[[], object]) -> float:
    """Of a call; of a short one the quicker of two, for what else the machine does shall not count."""
    first = _once(call)
    return first if first > SHORT_S else min(first, _once(call))


def _once(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def forget_peak() -> None:
    """Let `peak_gib` count from now on, where Linux allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # where that is forbidden, the peak is that of the process from its start
        return


def peak_gib() -> float:
    """Most memory that this process has held at a time, libraries included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM:"))) / 2**20
