"""A text that lies in several shards, read as one: windows may cross the borders between them."""

from collections.abc import Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view


class Stream:
    """Shards one after the other; each is a vector of bytes or tokens, memory-mapped as a rule."""

    def __init__(self, shards: Sequence[np.ndarray]) -> None:
        self._shards = [shard for shard in shards if len(shard)] or [np.empty(0, np.uint8)]
        self._ends = np.cumsum([len(shard) for shard in self._shards])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The `length` elements from each of `starts` on, [len(starts), length], in the shards' type.

        starts: int64, at most len(self) - length.
        """
        if len(self._shards) == 1:
            return np.asarray(sliding_window_view(self._shards[0], length)[starts])
        windows = np.empty((len(starts), length), self._shards[0].dtype)
        shard_of = np.searchsorted(self._ends, starts, side="right")
        for number in np.unique(shard_of):
            shard, end = self._shards[number], self._ends[number]
            is_inside = (shard_of == number) & (starts + length <= end)
            if is_inside.any():
                windows[is_inside] = sliding_window_view(shard, length)[starts[is_inside] - (end - len(shard))]
        for row in (starts + length > self._ends[shard_of]).nonzero()[0]:
            windows[row] = self._across(int(shard_of[row]), int(starts[row]), length)
        return windows

    def _across(self, number: int, start: int, length: int) -> np.ndarray:
        """A window that begins in one shard and ends in another."""
        first = start - (int(self._ends[number]) - len(self._shards[number]))
        pieces, missing = [], length
        while missing:
            pieces.append(self._shards[number][first : first + missing])
            missing -= len(pieces[-1])
            first, number = 0, number + 1
        return np.concatenate(pieces)

    def tobytes(self) -> bytes:
        """All of it, in memory."""
        return b"".join(shard.tobytes() for shard in self._shards)
