"""A weight-tied causal transformer over bytes: one block, applied to each position as often as it needs.

A position that has halted keeps the keys and values of its last step and stays visible to attention; the mean field
over its steps forms only its output.

Legend: B sequences, T positions, R rows (positions) still running of B x T, D width, H heads, V vocabulary.
"""

import torch
from torch import Tensor, nn

from distcond.nn.halting import PonderStats
from distcond.nn.linear import TreeOptions, make_linear

VOCABULARY = 256


class Block(nn.Module):
    """Attention and feed-forward part over the rows still running; the cell of the ponder steps.

    The first matrix of the feed-forward part may be a tree. `start` is called once per batch, before the first step.
    """

    def __init__(self, width: int, heads: int, feed_forward: int, tree: TreeOptions) -> None:
        super().__init__()
        self.heads = heads
        self.first_step = nn.Linear(1, width, bias=False)
        self.attention_norm, self.feed_forward_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.merge = nn.Linear(width, width, bias=False)
        self.up = make_linear(width, feed_forward, tree)
        self.down = nn.Linear(feed_forward, width)
        self._shape = (0, 0)
        self._keys_values: Tensor | None = None

    def start(self, batch: int, length: int) -> None:
        """Forget the last batch; rows are positions of `batch` sequences of `length`."""
        self._shape, self._keys_values = (batch, length), None

    def forward(self, x: Tensor, state: Tensor, rows: Tensor) -> Tensor:
        """x [R, 1], the first-step flag; state [R, D]; rows int64 [R], places among B x T -> state [R, D]."""
        state = state + self.first_step(x)
        state = state + self.merge(self._attend(self.attention_norm(state), rows))
        hidden = nn.functional.gelu(self.up(self.feed_forward_norm(state)), approximate="tanh")
        fed: Tensor = self.down(hidden)
        return state + fed

    def _attend(self, x_RD: Tensor, rows_R: Tensor) -> Tensor:
        batch, length = self._shape
        width = x_RD.shape[1]
        query_RD, keys_values = self.qkv(x_RD).split([width, 2 * width], dim=1)
        everyone = len(rows_R) == batch * length
        if self._keys_values is None or everyone:
            self._keys_values = keys_values
        else:
            self._keys_values = self._keys_values.index_copy(0, rows_R, keys_values)
            query_RD = torch.zeros_like(self._keys_values[:, :width]).index_copy(0, rows_R, query_RD)
        key_RD, value_RD = self._keys_values.split(width, dim=1)
        q, k, v = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2) for part in (query_RD, key_RD, value_RD)
        )
        mixed = nn.functional.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        mixed_RD = mixed.transpose(1, 2).reshape(batch * length, width)
        return mixed_RD if everyone else mixed_RD[rows_R]


class Transformer(nn.Module):
    """Next-byte logits: embedding, a block under a halting module, a head.

    ponder: `AdaptiveComputation`, `PonderNet` or `FixedComputation` around the block.
    """

    def __init__(self, block: Block, ponder: nn.Module, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.ponder = ponder
        self.block = (block,)  # in a tuple: the block belongs to `ponder`, which registers its parameters once
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, inputs: Tensor, lengths: Tensor) -> tuple[Tensor, PonderStats]:
        """Bytes [B, T] -> logits [B, T, V] and the stats of all B x T positions; lengths are not needed here."""
        batch, length = inputs.shape
        state = self.embedding(inputs.long()).flatten(0, 1)
        self.block[0].start(batch, length)
        mean, stats = self.ponder(state.new_empty(len(state), 0), state)
        self.block[0].start(0, 0)
        logits = self._read(mean).view(batch, length, VOCABULARY)
        return logits, stats.read(self._read)

    def _read(self, state_RD: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(state_RD))
        return logits


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding of [B, H, T, d], d even (Su et al. 2021, arXiv 2104.09864)."""
    length, half = x.shape[2], x.shape[3] // 2
    frequency = 10000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.arange(length, device=x.device, dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
