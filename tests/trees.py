"""Tree layers for tests, in which every node exists and holds random numbers; and their function, token by token."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from distcond.nn import TreeLinear
from distcond.ops import first_node


def seed_cpu(seed: int) -> None:
    """As torch.manual_seed where nothing is drawn on a GPU.

    That one also leaves word for CUDA, MTIA and XPU, each time with the whole call stack as text: 1 ms under pytest.
    """
    torch.default_generator.manual_seed(seed)


def random_tree(
    depth: int, *, sizes: tuple[int, int] = (5, 4), seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any
) -> TreeLinear:
    """A layer of (in, out) = sizes whose nodes hold normal numbers of variance 1 / in, and its thresholds some too."""
    seed_cpu(seed)
    layer = TreeLinear(*sizes, depth, **options).to(dtype)
    fill(layer)
    return layer


@torch.no_grad()
def fill(layer: TreeLinear, *, most_levels: int = 62) -> None:
    """Give every node down to a level normal numbers of variance 1 / in, and the thresholds some too."""
    spread = layer.in_features**-0.5
    if layer.gate is not None:
        layer.gate.running_mean.normal_(std=0.1)
    if layer.table is None:
        for name, parameter in layer.named_parameters():
            if not name.startswith("gate."):
                parameter.normal_(std=spread)
        return
    bounds = [first_node(level, layer.num_trees) for level in range(min(layer.depth, most_levels) + 2)]
    layer.table.ensure([torch.arange(*ends) for ends in pairwise(bounds)])
    for _, store in layer.table.stores():
        store.data.normal_(std=spread)


def tokens(count: int, in_features: int = 5, *, seed: int = 1) -> Tensor:
    """Standard normal tokens, float64."""
    return torch.randn(count, in_features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def path(leaf: int, depth: int) -> list[int]:
    """Ids of the nodes on the path to a leaf, the root first."""
    return [2**level - 1 + (leaf >> (depth - level)) for level in range(depth + 1)]


def nodes_of(layer: TreeLinear) -> tuple[Tensor, Tensor]:
    """Matrix [nodes, out, in] and bias [nodes, out] of every node, by id; tree after tree."""
    with torch.no_grad():
        pairs = [layer._node(node, tree) for tree in range(layer.num_trees) for node in range(2 ** (layer.depth + 1) - 1)]
    return torch.stack([weight for weight, _ in pairs]), torch.stack([bias for _, bias in pairs])


def token_by_token(layer: TreeLinear, x: Tensor) -> Tensor:
    """effective_weight(leaf) @ x + c, one token after another, the outputs of each tree below those of the one before."""
    outputs = []
    for token, leaves in zip(x, layer.leaf(x).tolist(), strict=True):
        pairs = [layer.effective_weight(leaf, tree=tree) for tree, leaf in enumerate(leaves)]
        outputs.append(torch.cat([weight @ token + bias for weight, bias in pairs]))
    return torch.stack(outputs) if outputs else x.new_zeros(0, layer.out_features)
