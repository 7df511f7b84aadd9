"""Feed-forward models whose one residual block ponders: bytes from a fixed window before them, vectors on their own.

Legend: B sequences, T positions, R rows (positions) still running of B x T, W bytes in the window, E numbers a byte,
D width, V vocabulary, I input features, O outputs.
"""

import torch
from torch import Tensor, nn

from distcond.config.model import EMBEDDING
from distcond.nn.halting import PonderStats, placed
from distcond.nn.linear import TreeOptions, make_linear
from distcond.nn.transformer import VOCABULARY


class ResidualCell(nn.Module):
    """s' = s + W gelu(norm(s)) + b, where W may be a tree; the cell of the ponder steps. A row's first step has a bias more."""

    def __init__(self, width: int, tree: TreeOptions) -> None:
        super().__init__()
        self.first_step = nn.Linear(1, width, bias=False)
        self.norm = nn.RMSNorm(width)
        self.linear = make_linear(width, width, tree)

    def forward(self, x: Tensor, state: Tensor, rows: Tensor) -> Tensor:
        """x [R, 1], the first-step flag; state [R, D] -> state [R, D]."""
        state = state + self.first_step(x)
        hidden = nn.functional.gelu(self.norm(state), approximate="tanh")
        changed: Tensor = self.linear(hidden)
        return state + changed


class Head(nn.Module):
    """Logits of a state."""

    def __init__(self, width: int, output_size: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(width), nn.Linear(width, output_size)

    def forward(self, state: Tensor) -> Tensor:
        """[R, D] -> [R, O]."""
        logits: Tensor = self.linear(nn.functional.gelu(self.norm(state), approximate="tanh"))
        return logits


class WindowMLP(nn.Module):
    """Logits of the next byte or token from the `window` ones up to a position.

    Before the start of a sequence they are vectors of zeros.

    ponder: `AdaptiveComputation`, `PonderNet` or `FixedComputation` around a `ResidualCell`.
    """

    def __init__(self, ponder: nn.Module, width: int, window: int, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.window, self.ponder = window, ponder
        self.embedding = nn.Embedding(vocabulary, EMBEDDING)
        self.input = nn.Linear(window * EMBEDDING, width)
        self.head = Head(width, vocabulary)

    def forward(self, inputs: Tensor, lengths: Tensor) -> tuple[Tensor, PonderStats]:
        """Bytes or tokens [B, T] -> logits [B, T, V] and the stats of all B x T positions; lengths are not needed here."""
        padded_BTE = nn.functional.pad(self.embedding(inputs.long()), (0, 0, self.window - 1, 0))
        state = self.input(padded_BTE.unfold(1, self.window, 1).flatten(2)).flatten(0, 1)
        mean, stats = self.ponder(state.new_empty(len(state), 0), state)
        logits = self.head(mean).unflatten(0, inputs.shape)
        return logits, stats.read(self.head)


class VectorMLP(nn.Module):
    """Logits of each vector of a sequence, whatever stands before it; ponder as in `WindowMLP`."""

    def __init__(self, ponder: nn.Module, input_size: int, width: int, output_size: int) -> None:
        super().__init__()
        self.ponder = ponder
        self.input, self.head = nn.Linear(input_size, width), Head(width, output_size)

    def forward(self, inputs: Tensor, lengths: Tensor) -> tuple[Tensor, PonderStats]:
        """Vectors [B, T, I], lengths int64 [B] -> logits [B, T, O] and the stats of all B x T positions.

        Both are zeros beyond a sequence's length: nothing is computed there.
        """
        batch, length, _ = inputs.shape
        sequence, time = (torch.arange(length, device=lengths.device) < lengths[:, None]).nonzero(as_tuple=True)
        state = self.input(inputs[sequence, time])
        mean, stats = self.ponder(state.new_empty(len(state), 0), state)
        logits_RO = self.head(mean)
        logits = logits_RO.new_zeros(batch, length, logits_RO.shape[1]).index_put((sequence, time), logits_RO)
        return logits, placed([(sequence * length + time, stats)], batch * length, self.head)
