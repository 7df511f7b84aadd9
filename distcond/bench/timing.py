"""Clocks: functions timed in turn, so that whatever else the machine does falls on all of them; and the machine's limits."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

REPEATS = 7
GEMM_SIZE, DEVICE_GEMM_SIZE = 1024, 8192
"Rows of the square product on a CPU, and on a GPU, which needs a large one to be busy."
COPY_NUMBERS = 2**25
"fp32 numbers of the copy that bandwidth is measured with: 128 MiB, more than caches hold."


@dataclass(frozen=True, slots=True)
class Place:
    """Where layers are timed, and the precision of what passes between them."""

    device: torch.device
    dtype: torch.dtype


CPU = Place(torch.device("cpu"), torch.float32)


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of one function: median and quartiles."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Machine:
    """What bounds any layer here: matrix products; memory, as a copy sees it, read and write counted; and as it is read alone."""

    flops_per_s: float
    bytes_per_s: float
    read_bytes_per_s: float

    def floor_ms(self, flops: float, traffic: float, reads: float = 0.0) -> float:
        """Least time for this many operations, bytes of memory traffic, and bytes that are read while nothing is written."""
        return 1e3 * max(flops / self.flops_per_s, traffic / self.bytes_per_s + reads / self.read_bytes_per_s)


def places() -> list[Place]:
    """The GPU in both precisions where there is one, else the CPU."""
    if not torch.cuda.is_available():
        return [CPU]
    return [Place(torch.device("cuda"), dtype) for dtype in (torch.float32, torch.bfloat16)]


def time_in_turn(functions: Mapping[str, Callable[[], object]], repeats: int = REPEATS) -> dict[str, Timing]:
    """Time each function `repeats` times, one after the other, after one call that is not counted."""
    for function in functions.values():
        function()
    return {name: _timing(taken) for name, taken in milliseconds_in_turn(functions, repeats).items()}


def milliseconds_in_turn(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every call of each function, `repeats` times one after the other; whoever calls has warmed them up."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    gc.collect()
    gc.disable()
    try:
        for _ in range(repeats):
            for name, function in functions.items():
                _wait_for_device()
                start = time.perf_counter()
                function()
                _wait_for_device()
                taken[name].append(1e3 * (time.perf_counter() - start))
    finally:
        gc.enable()
    return taken


def time_beside_limits(functions: Mapping[str, Callable[[], object]], place: Place = CPU) -> tuple[dict[str, Timing], Machine]:
    """`time_in_turn`, and what the machine could do meanwhile: a square product, a copy and a sum, timed in the same rounds."""
    size = GEMM_SIZE if place.device.type == "cpu" else DEVICE_GEMM_SIZE
    left, right = torch.randn(2, size, size, device=place.device, dtype=place.dtype).unbind()
    product, source = torch.empty_like(left), torch.ones(COPY_NUMBERS, device=place.device)
    target = torch.zeros_like(source)
    limits = {
        "a product": lambda: torch.mm(left, right, out=product),
        "a copy": lambda: target.copy_(source),
        "a sum": lambda: source.sum(),
    }
    times = time_in_turn({**functions, **limits})
    product_s, copy_s, sum_s = (1e-3 * times.pop(name).median for name in limits)
    return times, Machine(2 * size**3 / product_s, 2 * source.nbytes / copy_s, source.nbytes / sum_s)


def _wait_for_device() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _timing(milliseconds: list[float]) -> Timing:
    low, median, high = statistics.quantiles(milliseconds, n=4)
    return Timing(median, low, high)
