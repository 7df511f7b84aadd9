"""The product of a tree layer as one autograd function: dispatch, product along the path, combine; and its mirror image.

Legend: T tokens, Q in, P out, K depth (bits), G nodes touched.
"""

from collections.abc import Collection
from typing import Any, Protocol

import torch
from torch import Tensor

from distcond.ops import (
    NodeTensors,
    Schedule,
    TreePath,
    factor_dtype,
    scaled_backward,
    scaled_forward,
    tree_backward,
    tree_forward,
    tree_path,
)
from distcond.table import Collective, NodeTable, Route, SubtreePlan


class TreeNodes(Protocol):
    """What the product needs to know of its layer."""

    in_features: int
    depth: int
    full_depth: int
    has_bias: bool
    scales_levels: bool
    "Whether the soft bits are factors of the levels' contributions; else their gradient alone is used."
    plan: SubtreePlan
    collective: Collective | None
    layout: NodeTable
    table: NodeTable | None

    def node_tensors(self, parameters: tuple[Tensor, ...]) -> NodeTensors:
        """The stored nodes as matrices, from the table or from the given parameters."""

    def gate_levels(self) -> Collection[int]:
        """Levels whose gates learn from this pass."""

    def note_backward(self, path: TreePath, statistics: Tensor | None) -> None:
        """Record what a backward pass reached."""


class TreeProduct(torch.autograd.Function):
    """Dispatch, product with the path's matrices, combine; backward is the mirror image."""

    @staticmethod
    def forward(
        ctx: Any,
        layer: TreeNodes,
        statistics: Tensor | None,
        x_TQ: Tensor,
        soft_TK: Tensor,
        leaf_T: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        """Rows [T, Q], soft bits [T, K], leaves int64 [T] and the layer's parameters -> [T, P]."""
        route = None
        if layer.plan.is_sharded and layer.collective is not None:
            route = Route.to(layer.plan.owner(leaf_T), layer.collective)
        # Factors travel beside the tokens, and in their own precision.
        sent_TQ = torch.cat([x_TQ.to(soft_TK.dtype), soft_TK], dim=1) if layer.scales_levels else x_TQ
        sent_TQ, leaf_T = (sent_TQ, leaf_T) if route is None else route.dispatch_with_leaf(sent_TQ, leaf_T)
        local_TQ, scale_TK = sent_TQ.split([layer.in_features, sent_TQ.shape[1] - layer.in_features], dim=1)
        path = tree_path(leaf_T, layer.depth)
        nodes = layer.node_tensors(parameters)
        rows = _rows(layer, path)
        schedule = Schedule.of(path, layer.full_depth, nodes)
        factor_TQ = local_TQ.to(factor_dtype(x_TQ.dtype, nodes))
        if layer.scales_levels:
            y_TP = scaled_forward(factor_TQ, scale_TK.to(nodes.weight_SPQ.dtype), path, rows, nodes, schedule)
        else:
            y_TP = tree_forward(factor_TQ, path, rows, nodes, schedule)
        ctx.save_for_backward(local_TQ, scale_TK, *parameters)
        ctx.layer, ctx.path, ctx.rows, ctx.schedule, ctx.route = layer, path, rows, schedule, route
        ctx.dtype, ctx.soft_dtype = x_TQ.dtype, soft_TK.dtype
        ctx.statistics, ctx.gate_levels = statistics, layer.gate_levels()
        y_TP = y_TP.to(x_TQ.dtype)
        return y_TP if route is None else route.combine(y_TP)

    @staticmethod
    def backward(ctx: Any, grad_TP: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients to rows, soft bits and parameters; those of a table are collected by the table."""
        layer: TreeNodes = ctx.layer
        path: TreePath = ctx.path
        local_TQ, scale_TK, *parameters = ctx.saved_tensors
        grad_TP = grad_TP.contiguous() if ctx.route is None else ctx.route.dispatch(grad_TP)
        levels, rows = [level.nodes_G for level in path.levels], ctx.rows
        if layer.table is not None and bool((torch.cat(rows) < 0).any()):
            rows = layer.table.ensure(levels)
        nodes = layer.node_tensors(tuple(parameters))
        dtype = nodes.weight_SPQ.dtype
        full_GW, low_GW = (part.to(dtype) for part in layer.layout.new_gradient(levels))
        out = layer.layout.as_matrices(full_GW, low_GW)
        with torch.autocast(grad_TP.device.type, enabled=False):
            local_TQ, grad_TP = (part.to(factor_dtype(ctx.dtype, nodes)) for part in (local_TQ, grad_TP))
            if layer.scales_levels:
                scaled = (local_TQ, scale_TK.to(dtype), grad_TP)
                grad_x, grad_soft = scaled_backward(*scaled, path, rows, nodes, ctx.schedule, out)
            else:
                grad_x, grad_soft = tree_backward(local_TQ, grad_TP, path, rows, nodes, ctx.schedule, ctx.gate_levels, out)
        layer.note_backward(path, ctx.statistics)
        grads: tuple[Tensor | None, ...] = (None,)
        if layer.table is not None:
            layer.table.add_gradient(rows, full_GW, low_GW)
        else:
            grads = _dense_gradients(layer, parameters, rows, out)
        if ctx.route is not None:
            both = ctx.route.combine(torch.cat([grad_x, grad_soft], dim=1))
            grad_x, grad_soft = both[:, : layer.in_features], both[:, layer.in_features :]
        return None, None, grad_x.to(ctx.dtype), grad_soft.to(ctx.soft_dtype), None, *grads


def anchor(x_TQ: Tensor) -> Tensor:
    """A scalar that asks for a gradient, so that backward reaches a table although no parameter stands for it."""
    return torch.zeros((), device=x_TQ.device).requires_grad_(torch.is_grad_enabled())


def _rows(layer: TreeNodes, path: TreePath) -> list[Tensor]:
    """Stored row of each node on the path, per level; -1 where it does not exist."""
    levels = [level.nodes_G for level in path.levels]
    if layer.table is None:
        first_low = 2 ** (layer.full_depth + 1) - 1
        return [nodes_G - (first_low if number > layer.full_depth else 0) for number, nodes_G in enumerate(levels)]
    return layer.table.find(levels)


def _dense_gradients(layer: TreeNodes, parameters: list[Tensor], rows: list[Tensor], out: NodeTensors) -> tuple[Tensor, ...]:
    """Gradients of the node parameters: zeros but for the touched nodes."""
    weight, bias, right, left = (torch.zeros_like(parameter) for parameter in parameters)
    full_G = torch.cat(rows[: layer.full_depth + 1])
    weight[full_G] = out.weight_SPQ
    if layer.has_bias:
        bias[full_G] = out.bias_SP
    if layer.full_depth < layer.depth:
        low_G = torch.cat(rows[layer.full_depth + 1 :])
        right[low_G], left[low_G] = out.right_SrQ, out.left_SxP
    return weight, bias, right, left
