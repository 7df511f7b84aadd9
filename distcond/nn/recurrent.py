"""A recurrent network that ponders each element of a sequence (Graves 2016).

Legend: B sequences, T time steps, I input features, H hidden units, O outputs, R rows still running.
"""

import torch
from torch import Tensor, nn

from distcond.nn.halting import PonderStats, State, placed
from distcond.nn.linear import TreeOptions, make_linear
from distcond.nn.transformer import VOCABULARY


class TanhCell(nn.Module):
    """s' = tanh(W [x, s] + b); W may be a tree."""

    def __init__(self, input_size: int, width: int, tree: TreeOptions) -> None:
        super().__init__()
        self.linear = make_linear(input_size + width, width, tree)

    def forward(self, x: Tensor, state: Tensor, rows: Tensor) -> Tensor:
        """x [R, I], state [R, H] -> state [R, H]."""
        return torch.tanh(self.linear(torch.cat([x, state], dim=1)))


class LSTMCell(nn.Module):
    """Long short-term memory; one matrix, which may be a tree, makes the four gates (Hochreiter & Schmidhuber 1997)."""

    def __init__(self, input_size: int, width: int, tree: TreeOptions) -> None:
        super().__init__()
        self.linear = make_linear(input_size + width, 4 * width, tree)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
        """x [R, I], state (output, memory) each [R, H] -> the same."""
        output, memory = state
        gates = self.linear(torch.cat([x, output], dim=1))
        write, forget, read, candidate = gates.chunk(4, dim=1)
        memory = torch.sigmoid(forget) * memory + torch.sigmoid(write) * torch.tanh(candidate)
        return torch.sigmoid(read) * torch.tanh(memory), memory


class GRUCell(nn.Module):
    """Gated recurrent unit; one matrix, which may be a tree, makes both gates and both parts of the candidate.

    s' = z s + (1 - z) tanh(a + r b), where r, z, a and b all read [x, s]. In Cho et al. 2014 (arXiv 1406.1078), in the form
    of `nn.GRUCell`, a reads x alone and b reads s alone: that is the case in which the other weights of a and b are zero.
    """

    def __init__(self, input_size: int, width: int, tree: TreeOptions) -> None:
        super().__init__()
        self.linear = make_linear(input_size + width, 4 * width, tree)

    def forward(self, x: Tensor, state: Tensor, rows: Tensor) -> Tensor:
        """x [R, I], state [R, H] -> state [R, H]."""
        reset, keep, of_input, of_state = self.linear(torch.cat([x, state], dim=1)).chunk(4, dim=1)
        candidate = torch.tanh(of_input + torch.sigmoid(reset) * of_state)
        return torch.lerp(candidate, state, torch.sigmoid(keep))


CELLS: dict[str, type[nn.Module]] = {"tanh": TanhCell, "lstm": LSTMCell, "gru": GRUCell}


class Recurrent(nn.Module):
    """Logits at every time step: a cell under a halting module, and a head on the mean-field state.

    num_states: tensors in the cell's state, each [B, width].
    """

    def __init__(self, ponder: nn.Module, width: int, num_states: int, output_size: int) -> None:
        super().__init__()
        self.ponder, self.width, self.num_states = ponder, width, num_states
        self.head = nn.Linear(width, output_size)

    def forward(self, inputs: Tensor, lengths: Tensor) -> tuple[Tensor, PonderStats]:
        """Vectors [B, T, I] or bytes [B, T], lengths int64 [B] -> logits [B, T, O] and the stats of all B x T positions.

        Bytes are one-hot vectors. All T steps are taken, with no rows where every sequence has ended: ranks stay in lockstep
        over ragged lengths. Stats beyond a sequence's length are zeros.
        """
        if inputs.dim() == 2:
            inputs = nn.functional.one_hot(inputs.long(), VOCABULARY).to(self.head.weight.dtype)
        batch, length, _ = inputs.shape
        states = tuple(inputs.new_zeros(batch, self.width) for _ in range(self.num_states))
        logits, spent = [], []
        for time in range(length):
            rows = (lengths > time).nonzero()[:, 0]
            running: State = tuple(part[rows] for part in states)
            mean, stats = self.ponder(inputs[rows, time], running if self.num_states > 1 else running[0])
            parts = mean if isinstance(mean, tuple) else (mean,)
            states = tuple(old.index_copy(0, rows, new) for old, new in zip(states, parts, strict=True))
            logits.append(self.head(states[0]))
            spent.append((rows * length + time, stats))
        return torch.stack(logits, dim=1), placed(spent, batch * length, self.head)
