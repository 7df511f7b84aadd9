"""A recurrent cell under adaptive computation over whole sequences, compiled: no Python and no tensor a step.

Chosen by `use_kernels("native")`; see csrc/recurrent.c for how it computes. Threads are torch's; each has sequences of its own.

Legend: B sequences, T time steps, H hidden units, G outputs of the cell's matrix.
"""

import ctypes
import functools
import weakref
from ctypes import POINTER, c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distcond.ops.compiler import load_compiled

CELLS = ("tanh", "lstm", "gru")
"In the order of csrc/cells.h."


class _Net(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("batch", "length", "width", "max_steps", "cell", "halts", "records")),
        ("least", c_float),
        *((name, c_void_p) for name in ("lengths", "given", "weight")),
        ("row", c_int64),
        ("halting", c_void_p),
        ("bias", c_float),
        *((name, c_void_p) for name in ("outputs", "remainder", "steps")),
    )


class _Gradients(ctypes.Structure):
    _fields_ = tuple((name, c_void_p) for name in ("outputs", "remainder", "given", "weight", "halting"))


_SIGNATURES = {
    "recurrent_forward": (c_void_p, (POINTER(_Net), c_int)),
    "recurrent_backward": (None, (POINTER(_Net), c_void_p, POINTER(_Gradients))),
    "tape_free": (None, (c_void_p,)),
}


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled loop. Raises ConfigError where it cannot be compiled."""
    return load_compiled(Path(__file__).parent / "csrc" / "recurrent.c", _SIGNATURES)


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Tape:
    """What a forward pass left for its backward pass; its memory is used again once this object is gone."""

    address: int
    net: _Net
    held: tuple[Tensor, ...]
    "What `net` points to, of the inputs."


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
    """Outputs [T, B, H], N int64 [T, B], R [T, B] and the tape.

    given_TBG: what inputs and biases give to the outputs of the matrix. weight [G, 1 + H]: its columns of the flag and of
    the state, each row contiguous. halting: weights [H], scaled, and bias [1] of the unit; None: `max_steps` for every row.
    records: whether backward follows; else the tape is empty.
    """
    (length, batch, outputs), width = given_TBG.shape, weight.shape[1] - 1
    assert outputs == len(weight) and weight.stride(1) == 1
    lengths_B, given_TBG = lengths_B.contiguous(), given_TBG.contiguous()
    states, remainder = given_TBG.new_empty(length, batch, width), given_TBG.new_zeros(length, batch)
    steps = torch.zeros(length, batch, dtype=torch.int64)
    unit, bias = (halting[0].contiguous(), halting[1].item()) if halting else (given_TBG.new_zeros(0), 0.0)
    net = _Net(
        batch=batch,
        length=length,
        width=width,
        max_steps=max_steps,
        cell=CELLS.index(cell),
        halts=halting is not None,
        records=records,
        least=1.0 - epsilon,
        lengths=lengths_B.data_ptr(),
        given=given_TBG.data_ptr(),
        weight=weight.data_ptr(),
        row=weight.stride(0),
        halting=unit.data_ptr(),
        bias=bias,
        outputs=states.data_ptr(),
        remainder=remainder.data_ptr(),
        steps=steps.data_ptr(),
    )
    address = library().distcond_recurrent_forward(net, max(1, min(torch.get_num_threads(), batch)))
    tape = Tape(address, net, (lengths_B, weight, unit))
    weakref.finalize(tape, library().distcond_tape_free, address)
    return states, steps, remainder, tape


def backward(tape: Tape, grad_TBH: Tensor, grad_left_TB: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `given` [T, B, G], of the weight [G, 1 + H] and of the halting unit's scaled weights [H] and bias [1]."""
    net, (length, batch, width) = tape.net, grad_TBH.shape
    outputs = len(tape.held[1])
    grad_TBH, grad_left_TB = grad_TBH.contiguous(), grad_left_TB.contiguous()
    given, weight = grad_TBH.new_zeros(length, batch, outputs), grad_TBH.new_empty(outputs, 1 + width)
    halting = grad_TBH.new_zeros(width + 1)
    pointers = (tensor.data_ptr() for tensor in (grad_TBH, grad_left_TB, given, weight, halting))
    library().distcond_recurrent_backward(net, tape.address, _Gradients(*pointers))
    return given, weight, halting[:width], halting[width:]
