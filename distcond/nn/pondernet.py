"""PonderNet: every step makes a prediction, and the probability of halting there weighs its loss (Banino et al. 2021).

Legend: B rows of the batch, R rows still running, I input features, N steps.
"""

import torch
from torch import Tensor

from distcond.nn.halting import (
    Cell,
    Drafts,
    Pondering,
    PonderStats,
    Running,
    State,
    add_weighted,
    check_finite,
    join,
    like,
)

HALF = 0.5
"A row's prediction is that of its median step."


class PonderNet(Pondering):
    """Applies a cell; step n of a row is its last with probability p_n = lambda_n prod_{j<n} (1 - lambda_j).

    cell, state_size, max_steps, halting_bias, lockstep, skips_nan: as for `AdaptiveComputation`. The halting unit gives
    lambda_n; what is left at a row's last step is that step's.

    In training a row runs until 1 - epsilon of the probability is spent, and `stats.drafts` holds the state of each step
    with its p_n, for a loss sum_n p_n L(y, y_n). In evaluation it runs to its median step, the first at which half is spent:
    the same answer every time, where the paper draws the step.

    The state that is returned, and handed on in time, is that of the median step in both. The paper has no series in time;
    here the gradient of that state is the one of the mean over p (straight-through): halting learns from what comes later.

    stats: ponder_cost is the mean of p, sum_n n p_n; remainder is the p_n of the last step. Of its regulariser, up to a
    constant, beta KL(p || geometric of parameter lambda_p) = -beta H(p) - beta log(1 - lambda_p) sum_n n p_n.
    Source: arXiv 2107.05407.
    """

    def __init__(
        self,
        cell: Cell,
        state_size: int,
        max_steps: int = 100,
        epsilon: float = 0.05,
        halting_bias: float = 1.0,
    ) -> None:
        super().__init__(cell, state_size, max_steps, epsilon, halting_bias)

    def forward(self, x: Tensor, state: State) -> tuple[State, PonderStats]:
        """x [B, I], state of B rows -> state of each row's median step, and what each row spent."""
        running = Running(self.cell, x, state, self.lockstep)
        least_left = self.epsilon if self.training else HALF
        mean = median = running.new_sums()
        left = running.new_shares() + 1
        steps, cost, remainder = torch.zeros_like(running.rows), torch.zeros_like(left), torch.zeros_like(left)
        drafts: list[Drafts] = []
        for number in range(1, self.max_steps + 1):
            parts, rows = running.step(), running.rows
            before = left[rows]
            after = before * (1.0 - self.halting(parts[0]).to(left.dtype))
            halts = (after.detach() <= least_left) | (number == self.max_steps)
            weight = torch.where(halts, before, before - after)
            is_median = (before.detach() > HALF) & ((after.detach() <= HALF) | halts)
            mean = add_weighted(mean, rows, parts, weight)
            median = add_weighted(median, rows, tuple(part.detach() for part in parts), is_median)
            steps = steps.index_fill(0, rows, number)
            cost = cost.index_add(0, rows, number * weight)
            remainder = remainder.index_add(0, rows, torch.where(halts, weight, 0.0))
            left = left.index_copy(0, rows, after)
            drafts.append(Drafts(parts[0], rows, weight))
            if not running.keep(~halts):
                break
        if not self.skips_nan:
            check_finite(remainder)
        out = tuple(value + (field - field.detach()) for value, field in zip(median, mean, strict=True))
        return like(state, running.rounded(out)), PonderStats(steps, remainder, cost, join(drafts) if self.training else None)
