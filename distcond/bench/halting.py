"""What halting saves: rows that have halted leave the batch, where public implementations run it until its slowest row halts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distcond.bench.report import Row
from distcond.bench.timing import places, time_in_turn
from distcond.nn import AdaptiveComputation, FixedComputation
from distcond.nn.cells import CELLS
from distcond.nn.halting import PonderStats
from distcond.nn.linear import TreeOptions
from distcond.nn.recurrent import Recurrent

MAX_STEPS = 100
FULL, SHARP = 0.02, 1e6
"What a row counts up to, where tanh is the identity; slope of halting there: probabilities are 0 or 1."


@dataclass(frozen=True, slots=True)
class Case:
    """A cell over one time step, and how many steps its rows take."""

    cell: str
    width: int
    batch: int
    halting: str


CASES = [
    *(Case("lstm", 512, 128, name) for name in ("geometric", "uniform", "one in 128", "all alike")),
    *(Case("lstm", 128, 128, name) for name in ("geometric", "one in 128")),
    *(Case("tanh", 128, 128, name) for name in ("geometric", "one in 128")),
]
FULL_DEVICE = [Case("lstm", 128, 16384, name) for name in ("geometric", "one in 128")]
"On a GPU too: rows that it does not all run at the same time."
QUICK = [Case("lstm", 16, 32, "geometric")]


def bench_halting(quick: bool = False) -> Iterator[Row]:
    """One row a case, forward + backward and forward alone: the saving that steps promise, the one that time shows."""
    device = places()[0].device
    for case in QUICK if quick else [*CASES, *(FULL_DEVICE if device.type == "cuda" else [])]:
        for trains in (True, False):
            yield _row(case, device, trains=trains)


def _row(case: Case, device: torch.device, *, trains: bool) -> Row:
    torch.manual_seed(0)
    steps = wanted_steps(case).to(device)
    ponder, inputs = counting(case, steps)
    ponder, inputs = ponder.to(device), inputs.to(device)
    lengths = torch.ones_like(steps)
    longest = FixedComputation(ponder.cell, int(steps.max()))
    bodies = {"compacted": _recurrent(case, ponder), "to the longest": _recurrent(case, longest)}
    bodies["masked"] = _recurrent(case, MaskedComputation(ponder))
    _, stats = bodies["compacted"](inputs, lengths)
    assert torch.equal(stats.steps, steps), "halting is as it was planned"
    times = time_in_turn({name: _pass(body, inputs, lengths, trains=trains) for name, body in bodies.items()})
    ms = {name: timing.median for name, timing in times.items()}
    promised = len(steps) * int(steps.max()) / int(steps.sum())
    realised = ms["to the longest"] / ms["compacted"]
    return {
        "device": device.type,
        "cell": case.cell,
        "width": case.width,
        "batch": case.batch,
        "halting": case.halting,
        "pass": "training" if trains else "inference",
        "mean steps": float(steps.double().mean()),
        "most": int(steps.max()),
        "ms": ms["compacted"],
        "from": times["compacted"].low,
        "to": times["compacted"].high,
        "saving promised": promised,
        "saving": realised,
        "saving / promised": realised / promised,
        "masked loop / this": ms["masked"] / ms["compacted"],
    }


def wanted_steps(case: Case) -> Tensor:
    """Steps of each row: geometric of mean 5; 1 to 9 alike often; one row 25 and the others 2; 5 each."""
    generator = torch.Generator().manual_seed(0)
    if case.halting == "geometric":
        drawn = torch.empty(case.batch).geometric_(0.2, generator=generator).long()
        return drawn.clamp(max=MAX_STEPS)
    if case.halting == "uniform":
        return torch.randint(1, 10, (case.batch,), generator=generator)
    steps = torch.full((case.batch,), 5 if case.halting == "all alike" else 2)
    if case.halting == "one in 128":
        steps[::128] = 25
    return steps


def counting(case: Case, steps: Tensor) -> tuple[AdaptiveComputation, Tensor]:
    """A cell whose first hidden unit counts up by its row's input, a halting unit that asks that one; and inputs [B, 1, 2]."""
    cell = CELLS[case.cell](2 + 1, case.width, TreeOptions())
    ponder = AdaptiveComputation(cell, case.width, MAX_STEPS)
    linear, unit = cell.linear, case.width
    assert isinstance(linear, nn.Linear)
    with torch.no_grad():
        linear.weight[::unit] = 0.0
        linear.bias[::unit] = 0.0
        if case.cell == "lstm":  # memory += tanh(x), output = tanh(memory)
            linear.bias[: 3 * unit : unit] = 30.0
            linear.weight[3 * unit, 1] = 1.0
        else:  # s = tanh(s + x), x small
            linear.weight[0, 1], linear.weight[0, 3] = 1.0, 1.0
        ponder.halting.weight.zero_()
        ponder.halting.weight[0, 0] = SHARP * unit**0.5
        ponder.halting.bias.fill_(-FULL * SHARP)
    inputs = torch.randn(len(steps), 1, 2)
    inputs[:, 0, 1] = FULL / (steps.cpu() - 0.5)
    return ponder, inputs


class MaskedComputation(nn.Module):
    """`AdaptiveComputation` as public implementations write it: all rows take every step, and a mask says which still count."""

    def __init__(self, ponder: AdaptiveComputation) -> None:
        super().__init__()
        self.cell, self.halting = ponder.cell, ponder.halting
        self.max_steps, self.epsilon = ponder.max_steps, ponder.epsilon

    def forward(self, x: Tensor, state: Tensor | tuple[Tensor, ...]) -> tuple[Tensor | tuple[Tensor, ...], PonderStats]:
        """x [B, I], state of B rows -> mean-field state, and what each row spent."""
        rows = torch.arange(len(x), device=x.device)
        spent, steps, left = x.new_zeros(len(x)), torch.zeros_like(rows), x.new_zeros(len(x))
        runs = torch.ones_like(rows, dtype=torch.bool)
        mean: list[Tensor] = []
        for number in range(1, self.max_steps + 1):
            flag = x.new_full((len(x), 1), float(number == 1))
            state = self.cell(torch.cat([x, flag], dim=1), state, rows)
            parts = state if isinstance(state, tuple) else (state,)
            h = self.halting(parts[0])
            halts = runs & ((spent.detach() + h.detach() >= 1.0 - self.epsilon) | (number == self.max_steps))
            weight = torch.where(halts, 1.0 - spent, h) * runs
            weighted = [part * weight[:, None] for part in parts]
            mean = weighted if not mean else [total + part for total, part in zip(mean, weighted, strict=True)]
            spent, steps, left = spent + weight, steps + runs, left + weight * halts
            runs = runs & ~halts
            if not bool(runs.any()):
                break
        return tuple(mean) if isinstance(state, tuple) else mean[0], PonderStats(steps, left, steps + left)


def _recurrent(case: Case, ponder: nn.Module) -> Recurrent:
    body = Recurrent(ponder, case.width, CELLS[case.cell].states, 1)
    return body.to(next(ponder.parameters()).device)


def _pass(body: Recurrent, inputs: Tensor, lengths: Tensor, *, trains: bool) -> Callable[[], None]:
    def run() -> None:
        with torch.set_grad_enabled(trains):
            logits, stats = body(inputs, lengths)
            if trains:
                (logits.sum() + 1e-3 * stats.ponder_cost.sum()).backward()
                body.zero_grad()

    return run
