"""The tree product on devices other than the CPU: a fixed number of calls for each level, whatever the number of nodes.

Matrices along the path are added up level by level for all nodes at once, and products are those of `ragged`. Nothing waits
for a number from the device. Rows stay in their own precision, and so do sums over tokens, levels and children; matrices are
rounded to the precision of x when they are multiplied. Low-rank nodes are gathered as elsewhere: memory bounds them, and their
rows are read once.

Legend: T tokens, Q in, P out, p some of P, K depth, G nodes touched on a level, L low-rank levels, S rows stored.
"""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from distcond.ops.gathered import add_gathered, gathered_backward
from distcond.ops.path import Level, NodeTensors, Schedule, TreePath, gradient_rows, scale_from, scaled
from distcond.ops.ragged import Runs, run_outer, run_product

SUM_NUMBERS = 2**28
"Numbers of a level's matrices that are in work at a time, 1 GiB in fp32; where there are more, some rows of P after others."


@dataclass(frozen=True, slots=True)
class _Full:
    """The full levels of a call: stored matrices and biases, of which some rows of P are looked at, and runs of tokens."""

    weight_SpQ: Tensor
    bias_Sp: Tensor
    rows: Sequence[Tensor]
    levels: Sequence[Level]
    runs: list[Runs]
    merged: int
    dtype: torch.dtype
    "Of matrices when they are multiplied."

    @classmethod
    def of(
        cls, path: TreePath, rows: Sequence[Tensor], nodes: NodeTensors, schedule: Schedule, merges: bool, dtype: torch.dtype
    ) -> Self:
        end, merged = schedule.full_depth + 1, schedule.merged if merges else 0
        runs = [Runs.of(level.count_G, len(path.order_T)) for level in path.levels[:end]]
        return cls(nodes.weight_SPQ, nodes.bias_SP, rows[:end], path.levels[:end], runs, merged, dtype)

    def parts(self) -> Iterator[tuple[slice, "_Full"]]:
        """The same for some rows of P after others, so few that they fit into memory on the largest level."""
        out_features, in_features = self.weight_SpQ.shape[1:]
        most = max(len(rows_G) for rows_G in self.rows) * in_features
        step = max(16, SUM_NUMBERS // most // 16 * 16)  # rows of bf16 begin at multiples of 16 bytes
        for low in range(0, out_features, step):
            part = slice(low, low + step)
            yield part, dataclasses.replace(self, weight_SpQ=self.weight_SpQ[:, part], bias_Sp=self.bias_Sp[:, part])

    def factors(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Matrices and biases that every token meets, each with its level: the merged levels as one, then one by one."""
        yield self.merged, self._sums(self.weight_SpQ).to(self.dtype), self._sums(self.bias_Sp)
        for number in range(self.merged + 1, len(self.rows)):
            yield number, *self.level(number)

    def level(self, number: int) -> tuple[Tensor, Tensor]:
        """Matrices and biases of a level; where a node is missing, any."""
        rows_G = self.rows[number].clamp(min=0)
        return self.weight_SpQ.index_select(0, rows_G).to(self.dtype), self.bias_Sp.index_select(0, rows_G)

    def is_missing(self, number: int) -> Tensor:
        """Whether what `factors` gives for a level stands for a node that does not exist, bool [T, 1]."""
        return self.runs[number].per_row(self.rows[number] < 0)[:, None] & (number > self.merged)

    def _sums(self, tensor_S: Tensor) -> Tensor:
        """What the merged levels have in a tensor, from the root to each node of the last one together."""
        total_G = tensor_S.index_select(0, self.rows[0])
        for number in range(1, self.merged + 1):
            rows_G = self.rows[number]
            node_G, exists_G = tensor_S.index_select(0, rows_G.clamp(min=0)), (rows_G >= 0).to(tensor_S.dtype)
            above_G = total_G.index_select(0, self.levels[number].parent_G)
            total_G = above_G.addcmul_(node_G, exists_G.view(-1, *[1] * (node_G.dim() - 1)))
        return total_G


def batched_forward(
    x_TQ: Tensor,
    path: TreePath,
    rows: Sequence[Tensor],
    nodes: NodeTensors,
    schedule: Schedule,
    scale_TK: Tensor | None = None,
) -> Tensor:
    """`tree_forward` for at least one token; in the precision of the nodes."""
    x_TQ, scale_TK = path.in_order(x_TQ), None if scale_TK is None else path.in_order(scale_TK)
    y_TP = nodes.bias_SP.new_empty(len(x_TQ), nodes.bias_SP.shape[1])
    for part, full in _Full.of(path, rows, nodes, schedule, scale_TK is None, x_TQ.dtype).parts():
        sum_Tp = y_TP[:, part].zero_()
        for number, weight_GpQ, bias_Gp in full.factors():
            level_Tp = run_product(x_TQ, weight_GpQ, full.runs[number]) + full.runs[number].per_row(bias_Gp)
            sum_Tp += scaled(level_Tp, scale_TK, number).masked_fill_(full.is_missing(number), 0.0)
    low = schedule.full_depth + 1
    if low < len(rows):
        add_gathered(y_TP, x_TQ.to(y_TP.dtype), path.per_token(rows[low:]), nodes, scale_from(scale_TK, low))
    return y_TP.index_select(0, path.place_T)


def batched_backward(
    x_TQ: Tensor,
    grad_TP: Tensor,
    path: TreePath,
    rows: Sequence[Tensor],
    nodes: NodeTensors,
    schedule: Schedule,
    gate_levels: Collection[int],
    out: NodeTensors,
    scale_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`tree_backward` for at least one token; in the precision of the nodes."""
    x_TQ, grad_TP = path.in_order(x_TQ), path.in_order(grad_TP)
    scale_TK = None if scale_TK is None else path.in_order(scale_TK)
    grad_x_TQ = nodes.bias_SP.new_zeros(x_TQ.shape)
    grad_levels_TK = nodes.bias_SP.new_zeros(len(x_TQ), len(rows) - 1)
    for part, full in _Full.of(path, rows, nodes, schedule, scale_TK is None, x_TQ.dtype).parts():
        grad_Tp = grad_TP[:, part].contiguous()
        _add_input_gradient(grad_x_TQ, grad_levels_TK, full, x_TQ, grad_Tp, gate_levels, scale_TK)
        _weight_gradient(out.weight_SPQ[:, part], out.bias_SP[:, part], full, x_TQ, grad_Tp, scale_TK)
    low = schedule.full_depth + 1
    if low < len(rows):
        out.right_SrQ.zero_(), out.left_SxP.zero_()
        tokens = (grad_x_TQ, x_TQ.to(grad_x_TQ.dtype), grad_TP.to(grad_x_TQ.dtype))
        per_token = path.per_token(rows[low:]), path.slots_per_token(gradient_rows(rows, schedule.full_depth)[low:])
        through_TL = gathered_backward(*tokens, *per_token, nodes, out, scale_from(scale_TK, low))
        for number in range(low, len(rows)):
            if number in gate_levels:
                grad_levels_TK[:, number - 1] = through_TL[:, number - low]
    return grad_x_TQ.index_select(0, path.place_T), grad_levels_TK.index_select(0, path.place_T)


def _add_input_gradient(
    grad_x_TQ: Tensor,
    grad_levels_TK: Tensor,
    full: _Full,
    x_TQ: Tensor,
    grad_Tp: Tensor,
    gate_levels: Collection[int],
    scale_TK: Tensor | None,
) -> None:
    """Add what some rows of P give to the gradients of x and of the levels' multipliers."""

    def add_through(number: int, back_TQ: Tensor, bias_Gp: Tensor) -> None:
        through_T = torch.linalg.vecdot(x_TQ.to(grad_x_TQ.dtype), back_TQ.to(grad_x_TQ.dtype))
        through_T += torch.linalg.vecdot(full.runs[number].per_row(bias_Gp), grad_Tp.to(bias_Gp.dtype))
        grad_levels_TK[:, number - 1] += through_T

    for number, weight_GpQ, bias_Gp in full.factors():
        back_TQ = run_product(grad_Tp, weight_GpQ.mT, full.runs[number])
        grad_x_TQ += scaled(back_TQ, scale_TK, number)
        if number > full.merged and number in gate_levels:
            add_through(number, back_TQ, bias_Gp)
    for number in range(1, full.merged + 1):
        if number in gate_levels:
            weight_GpQ, bias_Gp = full.level(number)
            add_through(number, run_product(grad_Tp, weight_GpQ.mT, full.runs[number]), bias_Gp)


def _weight_gradient(
    out_SpQ: Tensor, out_Sp: Tensor, full: _Full, x_TQ: Tensor, grad_Tp: Tensor, scale_TK: Tensor | None
) -> None:
    """Write the gradients of some rows of P of all nodes: without a scale, those of the last level summed up the tree."""
    slots = gradient_rows(full.rows, len(full.rows))
    for number in reversed(range(len(slots))):
        weight_GpQ, bias_Gp, runs = out_SpQ[slots[number]], out_Sp[slots[number]], full.runs[number]
        bias_Gp.zero_()
        if number == len(slots) - 1 or scale_TK is not None:
            scaled_Tp = scaled(grad_Tp, scale_TK, number)
            weight_GpQ.copy_(run_outer(scaled_Tp.to(x_TQ.dtype), x_TQ, runs))
            bias_Gp.index_add_(0, runs.group_T, scaled_Tp.to(bias_Gp.dtype))
        else:
            parent_G, children = full.levels[number + 1].parent_G, slots[number + 1]
            weight_GpQ.zero_().index_add_(0, parent_G, out_SpQ[children])
            bias_Gp.index_add_(0, parent_G, out_Sp[children])
