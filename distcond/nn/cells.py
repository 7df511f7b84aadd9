"""Recurrent cells of one matrix, which may be a tree.

What follows the matrix stands apart, with its gradient, so that `RecurrentLoop` can do without autograd.

Legend: R rows, I input features, H hidden units.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from distcond.nn.linear import TreeOptions, make_linear

Tensors = tuple[Tensor, ...]


class RecurrentCell(nn.Module):
    """state' = what `pointwise` makes of W [x, s] + b, s being the first tensor of the state.

    Dense: columns of x and of s start uniform within one over the root of their own number, as if they were two matrices. Under
    one bound for both, parity of 64 bits leaves its plateau later (49.4 instead of 46.8% errors after 10,000 updates).
    """

    gates: ClassVar[int]
    "Outputs of the matrix for each hidden unit."
    states: ClassVar[int]
    "Tensors of the state, each [R, H]."

    def __init__(self, input_size: int, width: int, tree: TreeOptions) -> None:
        super().__init__()
        self.linear = make_linear(input_size + width, self.gates * width, tree)
        if isinstance(self.linear, nn.Linear):
            of_input, of_state = self.linear.weight.detach().split([input_size, width], dim=1)
            nn.init.uniform_(of_input, -(input_size**-0.5), input_size**-0.5)
            nn.init.uniform_(of_state, -(width**-0.5), width**-0.5)

    def forward(self, x: Tensor, state: Tensor | Tensors, rows: Tensor) -> Tensor | Tensors:
        """x [R, I], state [R, H] or a tuple of such -> the same."""
        parts = state if isinstance(state, tuple) else (state,)
        after, _ = self.pointwise(self.linear(torch.cat([x, parts[0]], dim=1)), parts)
        return after if isinstance(state, tuple) else after[0]

    @staticmethod
    def pointwise(output: Tensor, state: Tensors) -> tuple[Tensors, Tensors]:
        """Outputs of the matrix [R, gates x H] and the state -> the state after it, and what `pointwise_backward` needs."""
        raise NotImplementedError

    @staticmethod
    def pointwise_backward(
        grads: Tensors, saved: Tensors, before: Tensors, after: Tensors
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """From gradients of the state after to those of the outputs, and of the state before where it is read beside them."""
        raise NotImplementedError


class TanhCell(RecurrentCell):
    """s' = tanh(W [x, s] + b)."""

    gates, states = 1, 1

    @staticmethod
    def pointwise(output: Tensor, state: Tensors) -> tuple[Tensors, Tensors]:
        """See `RecurrentCell`."""
        return (torch.tanh(output),), ()

    @staticmethod
    def pointwise_backward(
        grads: Tensors, saved: Tensors, before: Tensors, after: Tensors
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """See `RecurrentCell`."""
        return torch.ops.aten.tanh_backward(grads[0], after[0]), (None,)


class LSTMCell(RecurrentCell):
    """Long short-term memory; state: output and memory (Hochreiter & Schmidhuber 1997)."""

    gates, states = 4, 2

    @staticmethod
    def pointwise(output: Tensor, state: Tensors) -> tuple[Tensors, Tensors]:
        """See `RecurrentCell`."""
        write, forget, read, candidate = output.chunk(4, dim=1)
        write, forget, read, candidate = torch.sigmoid(write), torch.sigmoid(forget), torch.sigmoid(read), torch.tanh(candidate)
        memory = forget * state[1] + write * candidate
        seen = torch.tanh(memory)
        return (read * seen, memory), (write, forget, read, candidate, seen)

    @staticmethod
    def pointwise_backward(
        grads: Tensors, saved: Tensors, before: Tensors, after: Tensors
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """See `RecurrentCell`."""
        write, forget, read, candidate, seen = saved
        of_memory = grads[1] + torch.ops.aten.tanh_backward(grads[0] * read, seen)
        parts = (
            torch.ops.aten.sigmoid_backward(of_memory * candidate, write),
            torch.ops.aten.sigmoid_backward(of_memory * before[1], forget),
            torch.ops.aten.sigmoid_backward(grads[0] * seen, read),
            torch.ops.aten.tanh_backward(of_memory * write, candidate),
        )
        return torch.cat(parts, dim=1), (None, of_memory * forget)


class GRUCell(RecurrentCell):
    """Gated recurrent unit; one matrix makes both gates and both parts of the candidate.

    s' = z s + (1 - z) tanh(a + r b), where r, z, a and b all read [x, s]. In Cho et al. 2014 (arXiv 1406.1078), in the form
    of `nn.GRUCell`, a reads x alone and b reads s alone: that is the case in which the other weights of a and b are zero.
    """

    gates, states = 4, 1

    @staticmethod
    def pointwise(output: Tensor, state: Tensors) -> tuple[Tensors, Tensors]:
        """See `RecurrentCell`."""
        reset, keep, of_input, of_state = output.chunk(4, dim=1)
        reset, keep = torch.sigmoid(reset), torch.sigmoid(keep)
        candidate = torch.tanh(of_input + reset * of_state)
        return (torch.lerp(candidate, state[0], keep),), (reset, keep, candidate, of_state)

    @staticmethod
    def pointwise_backward(
        grads: Tensors, saved: Tensors, before: Tensors, after: Tensors
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """See `RecurrentCell`."""
        reset, keep, candidate, of_state = saved
        of_candidate = torch.ops.aten.tanh_backward(grads[0] * (1.0 - keep), candidate)
        parts = (
            torch.ops.aten.sigmoid_backward(of_candidate * of_state, reset),
            torch.ops.aten.sigmoid_backward(grads[0] * (before[0] - candidate), keep),
            of_candidate,
            of_candidate * reset,
        )
        return torch.cat(parts, dim=1), (grads[0] * keep,)


CELLS: dict[str, type[RecurrentCell]] = {"tanh": TanhCell, "lstm": LSTMCell, "gru": GRUCell}
