"""A weight-tied causal transformer over bytes or tokens: one block, applied to each position as often as it needs.

A position that has halted keeps the keys and values of its last step and stays visible to attention; the mean field
over its steps forms only its output.

Legend: B sequences, T positions, R rows (positions) still running of B x T, D width, H heads, V vocabulary.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from distcond.nn.halting import PonderStats
from distcond.nn.linear import TreeOptions, make_linear

VOCABULARY = 256
"Of bytes."
MOST = 0.75
"Share of a sequence's positions up to which queries are gathered."


class Block(nn.Module):
    """Attention and feed-forward part over the rows still running; the cell of the ponder steps.

    layers: which of qkv, merge, up and down are trees. `start` is called once per batch, before the first step.
    """

    def __init__(self, width: int, heads: int, feed_forward: int, tree: TreeOptions, layers: Collection[str]) -> None:
        super().__init__()
        self.heads = heads
        self.first_step = nn.Linear(1, width, bias=False)
        self.attention_norm, self.feed_forward_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        kinds = {name: tree if name in layers else TreeOptions() for name in ("qkv", "merge", "up", "down")}
        self.qkv = make_linear(width, 3 * width, kinds["qkv"], bias=False)
        self.merge = make_linear(width, width, kinds["merge"], bias=False)
        self.up = make_linear(width, feed_forward, kinds["up"])
        self.down = make_linear(feed_forward, width, kinds["down"])
        self._shape = (0, 0)
        self._seen: Tensor | None = None
        self._memory: Memory | None = None

    def start(self, batch: int, length: int, memory: "Memory | None" = None) -> None:
        """Forget the last batch; rows are positions of `batch` sequences of `length`, all of them or those of a memory."""
        self._shape, self._seen, self._memory = (batch, length), None, memory

    def forward(self, x: Tensor, state: Tensor, rows: Tensor) -> Tensor:
        """x [R, 1], the first-step flag; state [R, D]; rows int64 [R], places among B x T -> state [R, D]."""
        state = state + self.first_step(x)
        state = state + self.merge(self._attend(self.attention_norm(state), rows))
        hidden = nn.functional.gelu(self.up(self.feed_forward_norm(state)), approximate="tanh")
        fed: Tensor = self.down(hidden)
        return state + fed

    def _attend(self, x_RD: Tensor, rows_R: Tensor) -> Tensor:
        (batch, length), memory, place_R = self._shape, self._memory, rows_R
        rows_R = place_R if memory is None else memory.place_R[place_R]
        width, position_R = x_RD.shape[1], rows_R % max(length, 1)
        parts = self.qkv(x_RD).unflatten(1, (3, self.heads, width // self.heads)).unbind(1)
        query_RHd, key_RHd = rotate(parts[0], position_R), rotate(parts[1], position_R)
        new = torch.stack([key_RHd, parts[2]], dim=1)
        everyone = len(rows_R) == batch * length
        if memory is not None:
            self._seen = memory.keep(new, place_R)
        else:
            self._seen = new if self._seen is None or everyone else self._seen.index_copy(0, rows_R, new)
        key, value = (part.transpose(1, 2) for part in self._seen.unflatten(0, (batch, length)).unbind(2))
        asked = None if everyone else _Asked(rows_R, position_R, self._shape)
        query = query_RHd.unflatten(0, (batch, length)) if asked is None else asked.spread(query_RHd)
        sees = None if asked is None else asked.sees
        mixed = nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2), key, value, attn_mask=sees, is_causal=sees is None
        )
        mixed = mixed.transpose(1, 2).flatten(2)
        return mixed.flatten(0, 1) if asked is None else mixed[asked.sequence_R, asked.place_R]


class _Asked:
    """The queries of rows still running, side by side in each sequence, so that time follows their number.

    rows_R: ascending places among B x T; position_R: those in their sequence. S below: most rows of a sequence, or T where
    these are more than MOST of it: masked attention over fewer queries is then no faster than causal one over all.
    """

    def __init__(self, rows_R: Tensor, position_R: Tensor, shape: tuple[int, int]) -> None:
        batch, length = shape
        self.sequence_R, self.place_R = rows_R // max(length, 1), position_R
        counts_B = torch.bincount(self.sequence_R, minlength=batch)
        most = int(counts_B.max()) if batch else 0
        self.sees: Tensor | None = None
        "Bool [B, 1, S, T], whether a query sees a position: itself and those before it; None: query s is at position s."
        self._shape = shape
        if most <= MOST * length:
            self._shape = (batch, most)
            self.place_R = torch.arange(len(rows_R), device=rows_R.device) - (counts_B.cumsum(0) - counts_B)[self.sequence_R]
            last_BS = position_R.new_zeros(self._shape).index_put((self.sequence_R, self.place_R), position_R)
            self.sees = (torch.arange(length, device=rows_R.device) <= last_BS[:, :, None])[:, None]

    def spread(self, x_RHd: Tensor) -> Tensor:
        """[B, S, H, d], zeros where there is no query."""
        return x_RHd.new_zeros(*self._shape, *x_RHd.shape[1:]).index_put((self.sequence_R, self.place_R), x_RHd)


class Memory:
    """Keys and values of positions that were read, for those that follow: the same answers as from the whole, up to rounding.

    At ponder step n a position shows what its step min(n, N) made, whatever follows it; so one entry a step is all there is
    to keep, and an entry is final once its position has halted. For inference: entries are written in place.
    """

    def __init__(self, batch: int, length: int) -> None:
        self.shape = (batch, length)
        "B and T: room for so many positions of so many sequences."
        self.place_R = torch.empty(0, dtype=torch.int64)
        "Places among B x T, ascending, of the positions that are being read."
        self._steps: list[Tensor] = []
        "Of each ponder step, [B T, 2, H, d]."
        self._step = 0
        self._last: Tensor | None = None

    def begin(self, place_R: Tensor) -> None:
        """Read positions whose sequences were read up to them."""
        self.place_R, self._step, self._last = place_R, 0, None

    def keep(self, new: Tensor, rows_R: Tensor) -> Tensor:
        """Take what the rows still running show at the next step, [R, 2, H, d]; what all positions show, [B T, 2, H, d]."""
        self._last = new if self._last is None else self._last.index_copy(0, rows_R, new)
        if self._step == len(self._steps):
            batch, length = self.shape
            fresh = self._steps[-1].clone() if self._steps else new.new_zeros(batch * length, *new.shape[1:])
            self._steps.append(fresh)
        self._step += 1
        return self._steps[self._step - 1].index_copy_(0, self.place_R, self._last)

    def end(self) -> None:
        """All have halted: at later steps they show what they showed last."""
        assert self._last is not None
        for seen in self._steps[self._step :]:
            seen.index_copy_(0, self.place_R, self._last)


class Transformer(nn.Module):
    """Logits of the next byte or token: embedding, a block under a halting module, a head.

    ponder: `AdaptiveComputation`, `PonderNet` or `FixedComputation` around the block.
    """

    def __init__(self, block: Block, ponder: nn.Module, width: int, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.ponder = ponder
        self.block = (block,)  # in a tuple: the block belongs to `ponder`, which registers its parameters once
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, inputs: Tensor, lengths: Tensor) -> tuple[Tensor, PonderStats]:
        """Bytes or tokens [B, T] -> logits [B, T, V] and the stats of all B x T positions; lengths are not needed here."""
        batch, length = inputs.shape
        state = self.embedding(inputs.long()).flatten(0, 1)
        self.block[0].start(batch, length)
        mean, stats = self.ponder(state.new_empty(len(state), 0), state)
        self.block[0].start(0, 0)
        logits = self._read(mean).unflatten(0, (batch, length))
        return logits, stats.read(self._read)

    @torch.no_grad()
    def read_on(self, ids_R: Tensor, place_R: Tensor, memory: Memory) -> tuple[Tensor, PonderStats]:
        """Bytes or tokens that follow those in a memory, [R], at places among B x T -> logits [R, V] and stats of R positions.

        place_R: int64, ascending; a sequence is read from its start on, without gaps.
        """
        state = self.embedding(ids_R.long())
        memory.begin(place_R)
        self.block[0].start(*memory.shape, memory)
        mean, stats = self.ponder(state.new_empty(len(state), 0), state)
        self.block[0].start(0, 0)
        memory.end()
        return self._read(mean), stats

    def _read(self, state_RD: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(state_RD))
        return logits


def rotate(x: Tensor, position: Tensor) -> Tensor:
    """Rotary position embedding of [R, H, d], d even, rows at positions int64 [R] (Su et al. 2021, arXiv 2104.09864)."""
    half = x.shape[2] // 2
    frequency = 10000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = position.float()[:, None, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
