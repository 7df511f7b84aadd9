"""How the gates of a tree learn from the loss although a bit is a step: what `gate_gradient` names.

Legend: V tokens (one for each tree), M trees, K bits of a tree, L levels that are flipped, P out of one tree.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from distcond.nn.tree_product import Gradients, first_order_alone

GATE_GRADIENTS = ("straight_through", "sampled", "magnitude", "flip", "flip_sampled", "none")


def soft_bits(kind: str, gates_TMK: Tensor, full_depth: int, flips: Sequence[int] = ()) -> Tensor:
    """t = tanh|g|, of which the product takes the gradient alone, unless levels are scaled by it (`magnitude`).

    `sampled` learns from one full level at a time, which stands for all of them. flips: levels that the product itself learns
    from as `learn_from_flips` does.
    """
    if flips:
        return gates_TMK.tanh() * _towards(gates_TMK, gates_TMK.shape[2], len(flips))
    if kind in {"none", "flip", "flip_sampled"}:
        return gates_TMK.detach()
    soft_TMK = gates_TMK.abs().tanh()
    if kind == "sampled" and full_depth > 1:
        soft_TMK = torch.cat([soft_TMK[..., :full_depth] * full_depth, soft_TMK[..., full_depth:]], dim=-1)
    return soft_TMK


def product_levels(kind: str, depth: int, full_depth: int, turn: int) -> list[int]:
    """Levels whose gates learn through the factor of their contribution, ascending. turn: counts steps."""
    if kind not in {"straight_through", "sampled"}:
        return []
    full = list(range(1, full_depth + 1))
    if kind == "sampled" and full:
        full = [full[turn % len(full)]]
    return [*full, *range(full_depth + 1, depth + 1)]


def flip_levels(kind: str, depth: int, turn: int) -> list[int]:
    """Levels whose gates learn from what the other bit would have given. turn: counts steps."""
    if kind == "flip":
        return list(range(1, depth + 1))
    return [1 + turn % depth] if kind == "flip_sampled" and depth else []


def learn_from_flips(
    y_VP: Tensor, gates_VK: Tensor, leaf_V: Tensor, levels: Sequence[int], output_of: Callable[[Tensor], Tensor]
) -> Tensor:
    """y itself; in backward its gates learn as if y moved, between the two values of a bit, with tanh(g) / 2.

    The gradient of g_l is dy . (W(b') x - W(b) x) times the slope, b' being b with bit l flipped and the bits below it as they
    are: to first order in y, the change of the loss. output_of: leaves of tokens, int64 [V] -> outputs [V, P]; called once for
    each level, without a gradient. Levels that are left out are stood for by those there are.
    """
    if not levels:
        return y_VP
    depth = gates_VK.shape[1]
    with torch.no_grad():
        flipped = [output_of(leaf_V ^ (1 << (depth - level))) for level in levels]
        change_VLP = torch.stack(flipped, dim=1) - y_VP.detach()[:, None]
    gates_VL = gates_VK[:, [level - 1 for level in levels]]
    soft_VL = gates_VL.tanh() * _towards(gates_VL, depth, len(levels))
    learned: Tensor = _Changes.apply(y_VP, soft_VL, change_VLP)  # type: ignore[no-untyped-call]
    return learned


def _towards(gates: Tensor, depth: int, flipped: int) -> Tensor:
    """How far y moves per unit of tanh(g) towards the other value of the bit, where so many of `depth` levels are flipped."""
    return torch.where(gates > 0, -0.5, 0.5) * (depth / flipped)


class _Changes(torch.autograd.Function):
    """y, whose gradient flows on to y and to soft numbers that each would change it by a given vector."""

    @staticmethod
    def forward(ctx: Any, y_VP: Tensor, soft_VL: Tensor, change_VLP: Tensor) -> Tensor:
        """Outputs [V, P], soft numbers [V, L], changes of the outputs [V, L, P] -> the outputs."""
        ctx.save_for_backward(change_VLP)
        ctx.dtype = soft_VL.dtype
        return y_VP.view_as(y_VP)

    @staticmethod
    @first_order_alone
    def backward(ctx: Any, grad_VP: Tensor) -> Gradients:
        """Gradients to the outputs and to the soft numbers."""
        (change_VLP,) = ctx.saved_tensors
        grad_VL = torch.bmm(change_VLP, grad_VP.to(change_VLP.dtype)[:, :, None])[:, :, 0]
        return grad_VP, grad_VL.to(ctx.dtype), None
