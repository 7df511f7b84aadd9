"""The product of a tree layer as one autograd function: dispatch, product along the path, combine; and its mirror image.

Legend: T tokens, V of them for each tree (a token's trees follow each other), Q in, P out of one tree, K depth (bits),
G nodes touched.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from distcond.nn.tree_walk import Walk, flip_of, rows_to_read
from distcond.ops import (
    NodeTensors,
    PerLevel,
    Schedule,
    TreePath,
    computes_flips,
    factor_dtype,
    tree_backward,
    tree_forward,
)
from distcond.table import Collective, NodeTable, Route, SubtreePlan, Visits, copy_rows, huge_empty_like

ANCHOR = torch.zeros((), device="cpu", requires_grad=True)
"Asks for a gradient, so that backward reaches a table although no parameter stands for it; none is ever given."
FIRST_ORDER_ALONE = (
    b"a TreeLinear has gradients of first order alone, but one of them is differentiated again (create_graph=True, as for a "
    b"gradient penalty); leave it out of what is differentiated twice"
)
UPDATED_BETWEEN = (
    "RowAdam has updated the nodes of a TreeLinear after this forward pass; call backward before its step, or compute the "
    "forward pass again"
)

Gradients = tuple[Tensor | None, ...]


def first_order_alone(backward: Callable[[Any, Tensor], Gradients]) -> Callable[[Any, Tensor], Gradients]:
    """A backward pass whose results are refused, by RuntimeError, where they are differentiated again.

    NOTE: `once_differentiable` refuses them only if the incoming gradient asks for one of its own. That of a plain sum does
    not, and the terms of the parameters would be left out without a word.
    """

    @wraps(backward)
    def checked(ctx: Any, grad: Tensor) -> Gradients:
        if not torch.is_grad_enabled():
            return backward(ctx, grad)
        with torch.no_grad():
            grads = backward(ctx, grad)
        refused: Any = torch._C._functions.DelayedError(FIRST_ORDER_ALONE, len(grads))
        marked: Gradients = refused(*(part if part is None else part.detach().requires_grad_() for part in grads))
        return marked

    return checked


class TreeNodes(Protocol):
    """What the product needs to know of its layer."""

    in_features: int
    depth: int
    num_trees: int
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

    def note_backward(self, path: TreePath, loads: Visits, statistics: Tensor | None) -> None:
        """Record what a backward pass reached; loads: leaves and their tokens."""


class TreeProduct(torch.autograd.Function):
    """Dispatch, product with the path's matrices, combine; backward is the mirror image."""

    @staticmethod
    def forward(
        ctx: Any,
        layer: TreeNodes,
        statistics: Tensor | None,
        flips: Sequence[int],
        x_TQ: Tensor,
        soft_VK: Tensor,
        leaf_V: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        """Rows [T, Q], soft bits [V, K], leaves int64 [V] and the layer's parameters -> [V, P].

        flips: levels whose soft bits are to learn from the change of y with the other bit; none unless `takes_flips`.
        """
        route = None
        local_TQ, scale_VK = x_TQ, soft_VK if layer.scales_levels else soft_VK[:, :0]
        if layer.plan.is_sharded and layer.collective is not None:
            route = Route.to(layer.plan.owner(leaf_V), layer.collective)
            local_TQ, scale_VK, leaf_V = _dispatch(route, layer.num_trees, local_TQ, scale_VK, leaf_V)
        walk = Walk.of(leaf_V, layer.layout, dense=layer.table is None)
        rows, nodes = walk.rows, layer.node_tensors(parameters)
        if layer.layout.rows_stay:
            rows, nodes = copy_rows(layer.layout, rows, x_TQ.device)
        schedule = Schedule.of(walk.path, min(layer.full_depth, walk.depth), nodes)
        factor_TQ = local_TQ.to(factor_dtype(x_TQ.dtype, nodes))
        scale_VL = scale_VK[:, : walk.depth].to(nodes.weight_SPQ.dtype) if layer.scales_levels else None
        y_VP = tree_forward(factor_TQ, walk.path, rows, nodes, schedule, scale_VL)
        ctx.save_for_backward(local_TQ, scale_VK, *parameters)
        ctx.layer, ctx.walk, ctx.schedule, ctx.route = layer, walk, schedule, route
        ctx.dtype, ctx.soft_dtype = x_TQ.dtype, soft_VK.dtype
        ctx.statistics, ctx.flips = statistics, flips
        ctx.gate_levels = [level for level in layer.gate_levels() if level <= walk.depth]
        ctx.num_updates, ctx.is_noted = layer.layout.num_updates, False
        y_VP = y_VP.to(x_TQ.dtype)
        return y_VP if route is None else route.combine(y_VP)

    @staticmethod
    @first_order_alone
    def backward(ctx: Any, grad_VP: Tensor) -> Gradients:
        """Gradients to rows, soft bits and parameters; those of a table are collected by the table, if they are asked for."""
        layer: TreeNodes = ctx.layer
        walk: Walk = ctx.walk
        if layer.layout.num_updates != ctx.num_updates:
            raise RuntimeError(UPDATED_BETWEEN)
        local_TQ, scale_VK, *parameters = ctx.saved_tensors
        grad_VP = grad_VP.contiguous() if ctx.route is None else ctx.route.dispatch(grad_VP)
        asking = [node for node, _ in ctx.next_functions[-len(parameters) :] if node is not None] if parameters else []
        learns = any(_is_asked(node) for node in asking)
        rows = places = walk.rows
        nodes = layer.node_tensors(tuple(parameters))
        if layer.table is not None:
            rows = walk.rows_for_backward(layer.table) if learns else layer.table.find(walk.path.nodes)
            places, nodes = rows_to_read(layer.table, rows, grad_VP.device)
        flips = [flip_of(walk, level, layer.layout, dense=layer.table is None) for level in ctx.flips]
        wanted = nodes.weight_SPQ
        kept = layer.layout.new_gradient(walk.path.nodes)
        made = [_room_like(part, wanted) for part in kept]
        out = layer.layout.as_matrices(*made)
        if learns and layer.table is None:
            out = _in_place_of_parameters(parameters, out)
        with full_precision(grad_VP):
            local_TQ, grad_VP = (part.to(factor_dtype(ctx.dtype, nodes)) for part in (local_TQ, grad_VP))
            tree = (walk.path, places, nodes, ctx.schedule)
            scale_VL = scale_VK[:, : walk.depth].to(wanted.dtype) if layer.scales_levels else None
            levels = range(1, walk.depth + 1) if layer.scales_levels else ctx.gate_levels
            grad_x, grad_soft = tree_backward(local_TQ, grad_VP, *tree, levels, out, flips, scale_VL)
        grad_soft = torch.nn.functional.pad(grad_soft, (0, layer.depth - walk.depth))
        notes = not ctx.is_noted and (learns or not asking)  # frozen nodes leave the thresholds to follow their mean
        ctx.is_noted |= notes
        if notes:
            layer.note_backward(walk.path, walk.loads, ctx.statistics)
        grads: Gradients = (None,) * len(parameters)
        if learns and layer.table is not None:
            layer.table.stage_new(walk.path, rows)
            if notes:
                layer.table.growth.stage(walk.asked)
            if layer.table.rows_stay:
                made = [own.copy_(part) for own, part in zip(kept, made, strict=True)]
            layer.table.add_gradient(rows, *made)
        elif learns:
            grads = _dense_gradients(layer, parameters, rows, out)
        if ctx.route is not None:
            both = ctx.route.combine(torch.cat([grad_x, grad_soft], dim=1))
            grad_x, grad_soft = both[:, : layer.in_features], both[:, layer.in_features :]
        if layer.num_trees > 1:
            grad_x = grad_x.unflatten(0, (-1, layer.num_trees)).sum(1)
        return None, None, None, grad_x.to(ctx.dtype), grad_soft.to(ctx.soft_dtype), None, *grads


def in_one_piece(forward: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """A layer's `forward` that `torch.compile` calls as it is: what it does follows its tokens, and so would graphs of it."""
    whole = _disable_dynamo(forward)  # NOTE: imports dynamo when called, which takes seconds; so only where that runs

    @wraps(forward)
    def called(layer: Any, x: Tensor) -> Tensor:
        return whole(layer, x) if torch.compiler.is_dynamo_compiling() else forward(layer, x)

    return called


def _is_asked(node: Any) -> bool:
    """Whether the backward pass that runs goes on to a node of its graph: `torch.autograd.grad(loss, x)` stops at x."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf whose gradient `torch.autograd.grad` is to return
        return True


def takes_flips(layer: TreeNodes, x_TQ: Tensor, parameters: tuple[Tensor, ...]) -> bool:
    """Whether the product learns from flips itself: where all nodes are at hand, by kernels that are made for it."""
    table = layer.table
    is_at_hand = table is None or (table.growth.takes_paths and not table.rows_stay)
    is_sharded = layer.plan.is_sharded and layer.collective is not None
    return is_at_hand and not is_sharded and computes_flips(x_TQ, layer.node_tensors(parameters))


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Where autocast does not apply on the device of `x`; entered only where it is on, for that takes its time."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _dispatch(route: Route, num_trees: int, x_TQ: Tensor, scale_VK: Tensor, leaf_V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, factors and leaves at the owners of the leaves; a row is sent to each of its trees."""
    sent_VQ = x_TQ[:, None].expand(-1, num_trees, -1).flatten(0, 1)
    if scale_VK.shape[1]:  # factors travel beside the tokens, and in their own precision
        sent_VQ = torch.cat([sent_VQ.to(scale_VK.dtype), scale_VK], dim=1)
    sent_VQ, leaf_V = route.dispatch_with_leaf(sent_VQ, leaf_V)
    local_VQ, scale_VK = sent_VQ.split([x_TQ.shape[1], scale_VK.shape[1]], dim=1)
    return local_VQ, scale_VK, leaf_V


def _room_like(rows_GW: Tensor, wanted: Tensor) -> Tensor:
    """Uninitialised rows of this shape, in the place and precision of another tensor; these, where they fit."""
    if rows_GW.device == wanted.device and rows_GW.dtype == wanted.dtype:
        return rows_GW
    return torch.empty_like(rows_GW, device=wanted.device, dtype=wanted.dtype)


def _in_place_of_parameters(parameters: list[Tensor], out: NodeTensors) -> NodeTensors:
    """Room for the gradients of touched nodes; where all are touched, as the gradient of the parameter itself.

    NOTE: zeros, and a copy of what was computed into them, made forward and backward of 33 to 530 MB of nodes 7 to 16% slower.
    """
    pairs = zip(parameters, out, strict=True)
    return NodeTensors(*(huge_empty_like(own) if own.shape == part.shape else part for own, part in pairs))


def _dense_gradients(layer: TreeNodes, parameters: list[Tensor], rows: PerLevel, out: NodeTensors) -> tuple[Tensor, ...]:
    """Gradients of the node parameters: zeros but for the touched nodes. out: as `_in_place_of_parameters` made it."""
    full_N, low_N = rows.split(layer.full_depth + 1)
    touched = (full_N, full_N, low_N, low_N)

    def gradient(parameter: Tensor, part: Tensor, rows_N: Tensor) -> Tensor:
        if parameter.shape == part.shape:
            return part
        grad = torch.zeros_like(parameter)
        if grad.numel():  # biases that are not there have none
            grad[rows_N] = part
        return grad

    return tuple(map(gradient, parameters, out, touched))
