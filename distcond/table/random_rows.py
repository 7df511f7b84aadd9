"""Random numbers that are a pure function of (seed, node id, place), so that it does not matter where a node is born."""

import torch
from torch import Tensor


def _as_int64(value: int) -> int:
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


# Constants of SplitMix64 (Steele, Lea & Flood 2014, doi 10.1145/2714064.2660195).
_GAMMA = _as_int64(0x9E3779B97F4A7C15)
_MIX_1 = _as_int64(0xBF58476D1CE4E5B9)
_MIX_2 = _as_int64(0x94D049BB133111EB)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical shift: int64 shifts would copy the sign."""
    return torch.bitwise_and(z >> bits, 2 ** (64 - bits) - 1)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser; int64 products wrap as unsigned ones do."""
    z = (z ^ _shift_right(z, 30)) * _MIX_1
    z = (z ^ _shift_right(z, 27)) * _MIX_2
    return torch.bitwise_xor(z, _shift_right(z, 31))


def uniform_rows(seed: int, nodes_G: Tensor, width: int, bound: float) -> Tensor:
    """Float32 numbers in [-bound, bound), [G, width], for int64 node ids."""
    stream_G = _mix(_mix(nodes_G + _as_int64(seed * _GAMMA)) + _GAMMA)
    place_W = torch.arange(1, width + 1, device=nodes_G.device) * _GAMMA
    bits_GW = _shift_right(_mix(stream_G[:, None] + place_W), 40)
    return (bits_GW.float() * 2.0**-23 - 1.0) * bound
