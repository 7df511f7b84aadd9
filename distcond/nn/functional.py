"""Halting weights of Adaptive Computation Time as a function of halting probabilities."""

import torch
from torch import Tensor

from distcond.nn.halting import check_options


def act_weights(h: Tensor, epsilon: float = 0.01, max_steps: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Weights p of the ponder steps, the number of steps N, and the remainder R, for halting probabilities h.

    h: [B, N] in (0, 1), one column a step. N = min{n : sum of h up to n >= 1 - epsilon}, at most max_steps (None: the
    columns of h). Returns weights [B, N] that sum to one (R at step N, zero after it), steps int64 [B], remainder [B]; in fp32
    at least, or sums of many small h drift. Raises ValueError for options outside their range.
    N is a constant in the gradient; R = 1 - sum of h before N passes gradient to those h.
    Source: Graves 2016, arXiv 1603.08983, equations 6 to 8, 13 and 18.
    """
    check_options(1 if max_steps is None else max_steps, epsilon)
    h = h.to(torch.promote_types(h.dtype, torch.float32))
    limit = h.shape[1] if max_steps is None else min(max_steps, h.shape[1])
    halted = h.detach().cumsum(1) >= 1.0 - epsilon
    halted[:, limit - 1 :] = True
    steps = halted.int().argmax(1) + 1
    place = torch.arange(1, h.shape[1] + 1, device=h.device)
    before = torch.where(place < steps[:, None], h, 0.0)
    remainder = 1.0 - before.sum(1)
    weights = torch.where(place == steps[:, None], remainder[:, None], before)
    return weights, steps, remainder
