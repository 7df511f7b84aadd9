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


def tree_cost(in_features: int, out_features: int, tree: TreeConfig) -> TreeCost:
    """Cost of one layer: parameters (2**(F+1) - 1)(PQ + P) + (2**(K+1) - 2**(F+1))(r(P + tQ) + P), MACs (F+1)PQ + (K-F)r(P+tQ).

    Both without the tKQ of the gates, which gates of signs do not have.
    """
    p, q, depth, trees = out_features, in_features, tree.depth, tree.num_trees
    full = tree.deepest_full_level
    low_rank = tree.rank * (p + trees * q)
    num_ids = trees * (2 ** (depth + 1) - 1)
    num_nodes = num_ids if tree.max_nodes is None else min(num_ids, tree.max_nodes)
    num_full = min(trees * (2 ** (full + 1) - 1), num_nodes)
    num_low = num_nodes - num_full
    gates = 0 if tree.gate == GateName.sign else trees * depth * q
    return TreeCost(
        node_parameters=(num_full * (p * q + p) + num_low * (low_rank + p)) // trees,
        gate_parameters=gates,
        macs=(full + 1) * p * q + (depth - full) * low_rank + gates,
    )


def model_cost(config: ModelConfig, *, is_text: bool, input_size: int, output_size: int, length: int) -> ModelCost:
    """Cost of a model on sequences of `length`; of text, both sizes are the vocabulary.

    Attention counts the mean of (length + 1) / 2 visible positions.
    """
    width = config.width
    halting = width + 1 if config.halting.kind in {"act", "ponder"} else 0
    if config.name == ModelName.transformer:
        tree = tree_cost(width, config.tree_outputs, config.tree)
        attention = 4 * width * width
        dense = input_size * width + 3 * width + width + attention + config.feed_forward * width + width
        dense += output_size * width + output_size
        per_step = attention + width * (length + 1) + tree.macs + config.feed_forward * width + width
        per_position = output_size * width
    elif config.name == ModelName.mlp:
        tree = tree_cost(width, config.tree_outputs, config.tree)
        inputs = config.window * EMBEDDING if is_text else input_size
        dense = (input_size * EMBEDDING if is_text else 0) + width * (inputs + 1) + 3 * width + output_size * (width + 1)
        per_step, per_position = tree.macs + width, width * (inputs + output_size)
    else:
        tree = tree_cost(input_size + 1 + width, config.tree_outputs, config.tree)
        dense = output_size * (width + 1)
        per_step, per_position = tree.macs, output_size * width
    gates_learn = config.tree.gate == GateName.linear and config.tree.gate_gradient != GateGradient.none
    gates = tree.gate_parameters if gates_learn else 0
    in_table = config.tree.depth > 0 and config.tree.storage != "dense"
    return ModelCost(
        dense_parameters=dense + gates + halting + (0 if in_table else tree.node_parameters),
        node_parameters=tree.node_parameters if in_table else 0,
        macs_per_step=per_step + (width if halting else 0),
        macs_per_position=per_position,
    )
