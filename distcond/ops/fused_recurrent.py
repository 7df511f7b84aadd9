"""A recurrent cell under adaptive computation over whole sequences by one kernel a pass (Triton): the host waits once a pass.

Every program takes 16 sequences from their first step to their last, so none waits for another; it ends with the longest of
them. Nothing depends on the order in which programs run. The gradient of the matrix is one product over all steps at the end.

Legend: B sequences, T time steps, H hidden units, G outputs of the cell's matrix, P programs, S ponder steps of a program.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from distcond.ops import fused_rows

CELLS = {"tanh": (1, 1, 0), "lstm": (2, 4, 5), "gru": (1, 4, 4)}
"States, gates and tensors kept of each step, in the order of the kernels' numbers."
ROWS = 16
"Sequences of a program: the fewest that tensor cores multiply."
WIDEST = 512
"Hidden units up to which this is faster than a launch for each operation: 2.3 times on an H200; of 1,024 as fast."
SMALL = 256
"Hidden units up to which smaller tiles are faster."

_room: dict[tuple[str, int, int, int], int] = {}
"Ponder steps of a program that the last batch of a kind took, and a quarter more."


@dataclass(frozen=True, slots=True)
class Tape:
    """What a forward pass left for its backward pass."""

    cell: str
    halts: bool
    room: int
    batch: int
    held: tuple[Tensor, ...]
    "Weights, halting unit, lengths, frames, what cells keep, marks, steps taken, steps used."


def serves(weight: Tensor, given_TBG: Tensor) -> bool:
    """Whether the kernels compute this: fp32 on a GPU where Triton works, of no more than `WIDEST` hidden units."""
    is_narrow = weight.dtype == given_TBG.dtype == torch.float32 and weight.shape[1] <= WIDEST + 1
    return is_narrow and bool(given_TBG.numel()) and fused_rows.serves(weight, given_TBG)


def forward(
    cell: str,
    lengths_B: Tensor,
    given_TBG: Tensor,
    weight: Tensor,
    halting: tuple[Tensor, Tensor] | None,
    max_steps: int,
    epsilon: float,
    *,
    records: bool,
) -> tuple[Tensor, Tensor, Tensor, Tape]:
    """Outputs [T, B, H], N int64 [T, B], R [T, B] and the tape, of at least one sequence and time step.

    given_TBG, weight [G, 1 + H], records: as in `native_recurrent.forward`. halting: weights [H], scaled, and bias [1].
    """
    length, batch, _ = given_TBG.shape
    width, kind = weight.shape[1] - 1, (cell, length, weight.shape[1], max_steps)
    states, gates, saved = CELLS[cell]
    programs = -(-batch // ROWS)
    lengths_B, given_TBG = lengths_B.contiguous(), given_TBG.contiguous()
    unit, bias = halting or given_TBG.new_zeros(2, 1).unbind()
    flag, of_state = weight[:, 0].contiguous(), weight[:, 1:].contiguous()
    by_unit = of_state.view(gates, width, width).permute(2, 1, 0).contiguous()
    steps, remainder = lengths_B.new_zeros(length, batch), given_TBG.new_zeros(length, batch)
    taken = torch.empty(programs, length, dtype=torch.int32, device=weight.device)
    used = torch.empty(programs, dtype=torch.int32, device=weight.device)
    room = _room.get(kind, 4 * length) if records else 0
    while True:
        frames = given_TBG.new_empty(programs, length + room + 3, states, ROWS, width)
        frames[:, 0] = 0.0
        made = given_TBG.new_empty(programs, room + 2, saved, ROWS, width)
        marks = given_TBG.new_empty(programs, room, 3, ROWS)
        _kernels().forward[(programs,)](
            given_TBG, by_unit, flag, unit, bias, lengths_B, frames, made, marks, steps, remainder, taken, used,
            batch, length, width, room, max_steps, 1.0 - epsilon,
            halts=halting is not None, **_options(cell, width, is_forward=True),
        )  # fmt: skip
        if not records:
            break
        most = int(used.max())
        _room[kind] = max(1, most + most // 4)
        if most <= room:
            break
        room = _room[kind]
    states_TBH = frames[:, 1 : length + 1, 0].transpose(0, 1).flatten(1, 2)[:, :batch]
    held = (of_state, unit, lengths_B, frames, made, marks, taken, used)
    return states_TBH, steps, remainder, Tape(cell, halting is not None, room, batch, held)


def backward(tape: Tape, grad_TBH: Tensor, grad_left_TB: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `given` [T, B, G], of the weight [G, 1 + H] and of the halting unit's scaled weights [H] and bias [1]."""
    of_state, unit, lengths_B, frames, made, marks, taken, used = tape.held
    (programs, length), (outputs, width) = taken.shape, of_state.shape
    room, states = tape.room, CELLS[tape.cell][0]
    out = of_state.new_zeros(programs, room, ROWS, outputs)
    met = of_state.new_zeros(programs, room, ROWS, width)
    of_given = of_state.new_zeros(length, programs * ROWS, outputs)
    work = of_state.new_zeros(programs, 2, states, ROWS, width)
    of_flag, of_halting = of_state.new_zeros(programs, outputs), of_state.new_zeros(programs, width + 1)
    _kernels().backward[(programs,)](
        of_state, unit, lengths_B, frames, made, marks, taken, used, grad_TBH.contiguous(), grad_left_TB.contiguous(),
        out, met, of_given, work, of_flag, of_halting, tape.batch, length, width, room,
        halts=tape.halts, **_options(tape.cell, width, is_forward=False),
    )  # fmt: skip
    of_weight = torch.cat([of_flag.sum(0)[:, None], out.flatten(0, 2).t() @ met.flatten(0, 2)], dim=1)
    of_unit = of_halting.sum(0)
    return of_given[:, : tape.batch], of_weight, of_unit[:-1], of_unit[-1:]


def _options(cell: str, width: int, *, is_forward: bool) -> dict[str, object]:
    states, gates, saved = CELLS[cell]
    is_small = width <= SMALL
    if is_forward:
        units, inner, stages = (32, 64, 3) if is_small else (64, 32, 2)
    else:
        units, inner, stages = (64, 128, 3) if is_small else (128, 64, 3)
    return {
        "cell": list(CELLS).index(cell), "states": states, "gates": gates, "saved": saved, "precision": fused_rows.precision(),
        "BM": ROWS, "BN": units, "BK": inner, "num_warps": 8, "num_stages": stages,
    }  # fmt: skip


def _kernels() -> ModuleType:
    from distcond.ops import triton_recurrent

    return triton_recurrent
