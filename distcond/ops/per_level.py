"""A value of each node that tokens visit, for all levels together: where nodes are few, calls cost more than numbers.

Legend: G nodes of a level, N of all levels.
"""

import functools
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import overload

import torch
from torch import Tensor


class PerLevel(Sequence[Tensor]):
    """One tensor of the values, seen as a sequence of one tensor [G] for each level, the roots first."""

    def __init__(self, flat_N: Tensor, bounds: Sequence[int]) -> None:
        """bounds: where each level begins in `flat_N`, and the end."""
        self.flat_N, self.bounds = flat_N, bounds

    @classmethod
    def of(cls, values: Sequence[Tensor]) -> "PerLevel":
        """The same of a tensor for each level."""
        if isinstance(values, cls):
            return values
        return cls(torch.cat(list(values)), [0, *accumulate(len(values_G) for values_G in values)])

    @property
    def sizes(self) -> list[int]:
        """Nodes of each level."""
        return [end - begin for begin, end in pairwise(self.bounds)]

    @functools.cached_property
    def has_missing(self) -> bool:
        """Whether any value is below 0, as a row is that does not exist; a device is waited for once."""
        return bool((self.flat_N < 0).any())

    def split(self, level: int) -> tuple[Tensor, Tensor]:
        """Values of the levels above a level, one after the other, and of those from it on."""
        at = self.bounds[min(level, len(self))]
        return self.flat_N[:at], self.flat_N[at:]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @overload
    def __getitem__(self, number: int) -> Tensor: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, number: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(number, slice):
            return [self[level] for level in range(len(self))[number]]
        level = range(len(self))[number]
        return self.flat_N[self.bounds[level] : self.bounds[level + 1]]
