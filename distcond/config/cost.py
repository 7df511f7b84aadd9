"""Closed forms: parameters of a model, and multiply-accumulate operations (MACs) it spends on a position.

Legend: P out, Q in, t trees, K depth, F full_depth, r rank.
"""

from dataclasses import dataclass

from distcond.config.choices import GateGradient, GateName, ModelName
from distcond.config.model import EMBEDDING, ModelConfig, TreeConfig


@dataclass(frozen=True, slots=True)
class TreeCost:
    """A tree layer. A dense layer is a tree of depth 0."""

    node_parameters: int
    "Parameters of all nodes if every one exists, or as many as max_nodes allows."
    gate_parameters: int
    macs: int
    "MACs per row: the products along the path and the gates."


@dataclass(frozen=True, slots=True)
class ModelCost:
    """A model."""

    dense_parameters: int
    "What DeepSpeed trains."
    node_parameters: int
    "What the node table may grow to."
    macs_per_step: int
    "MACs of one ponder step of one position."
    macs_per_position: int
    "MACs of one position outside its ponder steps."

    def macs(self, steps: float) -> float:
        """MACs of one position that takes this many ponder steps."""
        return self.macs_per_position + steps * self.macs_per_step


def tree_cost(in_features: int, out_features: int, tree: TreeConfig, *, has_bias: bool = True) -> TreeCost:
    """Cost of one layer: parameters (2**(F+1) - 1)(PQ + P) + (2**(K+1) - 2**(F+1))(r(P + tQ) + P), MACs (F+1)PQ + (K-F)r(P+tQ).

    Both without the tKQ of the gates, which gates of signs do not have; without a bias, neither sum has its + P.
    """
    p, q, depth, trees = out_features, in_features, tree.depth, tree.num_trees
    full = tree.deepest_full_level
    low_rank = tree.rank * (p + trees * q)
    num_ids = trees * (2 ** (depth + 1) - 1)
    num_nodes = num_ids if tree.max_nodes is None else min(num_ids, tree.max_nodes)
    num_full = min(trees * (2 ** (full + 1) - 1), num_nodes)
    num_low = num_nodes - num_full
    gates = 0 if tree.gate == GateName.sign else trees * depth * q
    bias = p if has_bias else 0
    return TreeCost(
        node_parameters=(num_full * (p * q + bias) + num_low * (low_rank + bias)) // trees,
        gate_parameters=gates,
        macs=(full + 1) * p * q + (depth - full) * low_rank + gates,
    )


DENSE = TreeConfig()
"Of a layer that is no tree."


def model_cost(config: ModelConfig, *, is_text: bool, input_size: int, output_size: int, length: int) -> ModelCost:
    """Cost of a model on sequences of `length`; of text, both sizes are the vocabulary.

    Attention counts the mean of (length + 1) / 2 visible positions.
    """
    width, tree = config.width, config.tree
    halting = width + 1 if config.halting.kind in {"act", "ponder"} else 0
    trees: list[TreeCost] = []
    layers: list[TreeCost] = []
    for name, (inputs, outputs, has_bias) in config.matrices(input_size).items():
        is_tree = name in config.tree_layers and tree.depth > 0
        cost = tree_cost(inputs, outputs, tree if is_tree else DENSE, has_bias=has_bias)
        (trees if is_tree else layers).append(cost)
    dense = output_size * (width + 1) + sum(layer.node_parameters for layer in layers)
    per_step = sum(layer.macs for layer in [*trees, *layers])
    per_position = output_size * width
    if config.name == ModelName.transformer:
        dense += input_size * width + 4 * width  # embedding; flag of the first step, three norms
        per_step += width + width * (length + 1)
    elif config.name == ModelName.mlp:
        inputs = config.window * EMBEDDING if is_text else input_size
        dense += (input_size * EMBEDDING if is_text else 0) + width * (inputs + 1) + 3 * width
        per_step, per_position = per_step + width, per_position + width * inputs
    gates_learn = tree.gate == GateName.linear and tree.gate_gradient != GateGradient.none
    gates = sum(layer.gate_parameters for layer in trees) if gates_learn else 0
    nodes = sum(layer.node_parameters for layer in trees)
    in_table = tree.storage != "dense"
    return ModelCost(
        dense_parameters=dense + gates + halting + (0 if in_table else nodes),
        node_parameters=nodes if in_table else 0,
        macs_per_step=per_step + (width if halting else 0),
        macs_per_position=per_position,
    )
