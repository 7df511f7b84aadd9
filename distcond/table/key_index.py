"""Places of int64 keys: look-up and insertion in O(log N) a key, amortised."""

import torch
from torch import Tensor

from distcond.ops import fused_rows, native

SMALL = 4096
"Keys that are sorted anew rather than kept apart: 0.2 ms."


class KeyIndex:
    """Places of keys, in sorted runs of which each is at least twice as long as the next (a log-structured merge)."""

    def __init__(self) -> None:
        self._runs: list[tuple[Tensor, Tensor]] = []

    def insert(self, keys_G: Tensor, places_G: Tensor) -> None:
        """Add distinct keys that are not there yet."""
        while self._runs and len(self._runs[-1][0]) < max(SMALL, 2 * len(keys_G)):
            keys_N, places_N = self._runs.pop()
            keys_G, places_G = torch.cat([keys_N, keys_G]), torch.cat([places_N, places_G])
        keys_G, order = torch.sort(keys_G)
        self._runs.append((keys_G, places_G[order]))

    def drop(self, first: int) -> None:
        """Forget the keys of all places from this one on."""
        kept = [(keys_N, places_N, places_N < first) for keys_N, places_N in self._runs]
        self._runs = [(keys_N[mask_N], places_N[mask_N]) for keys_N, places_N, mask_N in kept]

    def find(self, keys_G: Tensor) -> Tensor:
        """Place of each key, int64, -1 where there is none."""
        if native.looks_up(keys_G):
            return native.find(keys_G, self._runs)
        if fused_rows.serves(keys_G):
            return fused_rows.find(keys_G, self._runs)
        found_G = torch.full_like(keys_G, -1)
        for keys_N, places_N in self._runs:
            if len(keys_N):
                at_G = torch.searchsorted(keys_N, keys_G).clamp_(max=len(keys_N) - 1)
                found_G = torch.where(keys_N[at_G] == keys_G, places_N[at_G], found_G)
        return found_G

    def to(self, device: torch.device) -> None:
        """Move to a device, in place."""
        self._runs = [(keys_N.to(device), places_N.to(device)) for keys_N, places_N in self._runs]
