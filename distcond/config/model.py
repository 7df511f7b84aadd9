"""Configuration of a model: the tree of weights and the number of ponder steps are part of every one."""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from distcond.config.check import nearest_divisors, need
from distcond.config.choices import CellName, GateGradient, GateName, HaltingKind, ModelName, Storage
from distcond.config.plugins import check_name

EMBEDDING = 16
"Numbers that a byte of the window is embedded as (mlp on text)."


class Matrix(NamedTuple):
    """A linear layer of a model that may be a tree."""

    inputs: int
    outputs: int
    has_bias: bool = True


@dataclass(kw_only=True, slots=True)
class TreeConfig:
    """The tree of weight matrices (Cho & Bengio 2014). `depth: 0` is an ordinary dense layer."""

    depth: int = 0
    "K, the number of bits that choose a leaf; 2**K leaves; 0 to 62."
    layers: list[str] = field(default_factory=list)
    """Layers that are trees, alike and each with bits of its own. transformer: any of up, down (feed-forward part), qkv, merge
    (attention); rnn, mlp: linear, their only one. Empty: up, or linear."""
    full_depth: int | None = None
    "Levels up to this one hold full matrices, deeper ones low-rank factors; >= 0; null: every level is full."
    num_trees: int = 1
    "Trees of a layer, each for one part of its outputs and with K bits of its own; divides the outputs; >= 1."
    rank: int = 8
    "r, the rank of the factors below full_depth; >= 1."
    gate: GateName = GateName.linear
    "linear: K learned gating units a tree. hash: K fixed random hyperplanes (the control). sign: the layer's first inputs."
    gate_gradient: GateGradient = GateGradient.straight_through
    """How gates learn. straight_through: as if a bit were t = tanh|g|; sampled: of full levels one a step. flip: from what
    the other bit would have given; flip_sampled: one level a step. magnitude: levels are multiplied by t. none: not at all."""
    storage: Storage = Storage.lazy
    "lazy: nodes exist once data reached them, sharded over ranks. host: lazy, in host memory. dense: parameters, all exist."
    min_visits: int = 1
    "lazy: tokens that ask for a node before it exists, counted over steps; >= 1; above 1 a tree grows one level at a time."
    max_nodes: int | None = None
    "lazy: most nodes of a layer, over all ranks, roots included; there growth stops; >= num_trees; null: no limit."

    @property
    def deepest_full_level(self) -> int:
        """The deepest level that holds full matrices: full_depth where the tree is that deep."""
        return self.depth if self.full_depth is None else min(self.full_depth, self.depth)

    def __post_init__(self) -> None:
        need(0 <= self.depth <= 62, f"model.tree.depth={self.depth} is outside 0..62; node ids are 64-bit integers.")
        need(self.num_trees >= 1, f"model.tree.num_trees={self.num_trees} is below 1; use 1 or more.")
        need(
            self.depth + (self.num_trees - 1).bit_length() <= 62,
            f"model.tree.num_trees={self.num_trees} trees of model.tree.depth={self.depth} have more than 2**62 leaves; "
            "use a smaller depth.",
        )
        full = self.full_depth
        need(full is None or full >= 0, f"model.tree.full_depth={full} is negative; use 0 or more, or null for all levels.")
        need(self.rank >= 1, f"model.tree.rank={self.rank} is below 1; use 1 or more.")
        need(
            self.storage != Storage.dense or self.depth <= 20,
            f"model.tree.depth={self.depth} with storage=dense would hold 2**{self.depth + 1} - 1 matrices; use storage=lazy.",
        )
        need(self.min_visits >= 1, f"model.tree.min_visits={self.min_visits} is below 1; use 1 or more.")
        most = self.max_nodes
        need(
            most is None or most >= self.num_trees,
            f"model.tree.max_nodes={most} is below {self.num_trees}; the root of a tree always exists; null: no limit.",
        )
        need(
            self.storage != Storage.dense or (self.min_visits == 1 and most is None),
            f"model.tree.min_visits={self.min_visits}, max_nodes={most}: storage=dense holds every node; use storage=lazy.",
        )


@dataclass(kw_only=True, slots=True)
class HaltingConfig:
    """How many ponder steps an input is worth (act: Graves 2016; ponder: PonderNet, Banino et al. 2021)."""

    kind: HaltingKind = HaltingKind.none
    "none: one step. fixed: max_steps for everyone (the control). act: each input decides. ponder: it does, by a distribution."
    max_steps: int = 100
    "M, the most ponder steps; >= 1."
    epsilon: float | None = None
    "An input halts once 1 - epsilon of its halting probability is spent; in (0, 1); null: 0.01 (act) or 0.05 (ponder)."
    time_penalty: float | None = None
    "act: tau, the weight of the ponder cost N + R in the loss, nats a step; >= 0; null: 0.001, or what target_steps needs."
    prior_steps: float | None = None
    "ponder: 1/lambda_p, the mean of the geometric prior, steps; > 1; null: 5, or what target_steps needs."
    prior_weight: float = 0.01
    "ponder: beta, the weight of the divergence from the prior in the loss; > 0."
    target_steps: float | None = None
    "A budget instead of a penalty: the mean executed steps of training do not exceed it; 1 to max_steps; null: none."
    halting_bias: float = 1.0
    "Initial bias of the halting unit; 1 starts at about two steps."

    @property
    def least_left(self) -> float:
        """epsilon, or the published value for this kind of halting."""
        return self.epsilon if self.epsilon is not None else 0.05 if self.kind == HaltingKind.ponder else 0.01

    @property
    def initial_penalty(self) -> float:
        """Weight of the ponder cost in the loss: tau, or the slope of PonderNet's prior, -beta log(1 - lambda_p).

        Under a budget it is 0 at first, and then what `StepBudget` finds: for PonderNet, another prior.
        """
        if self.target_steps is not None:
            return 0.0
        if self.kind == HaltingKind.ponder:
            return -self.prior_weight * math.log1p(-1 / (5.0 if self.prior_steps is None else self.prior_steps))
        return 1.0e-3 if self.time_penalty is None else self.time_penalty

    def __post_init__(self) -> None:
        need(self.max_steps >= 1, f"model.halting.max_steps={self.max_steps} is below 1; use 1 or more.")
        need(0 < self.least_left < 1, f"model.halting.epsilon={self.epsilon} is outside (0, 1); Graves uses 0.01.")
        need((self.time_penalty or 0) >= 0, f"model.halting.time_penalty={self.time_penalty} is negative; use 0 or more.")
        is_ponder, prior = self.kind == HaltingKind.ponder, self.prior_steps
        need(prior is None or prior > 1, f"model.halting.prior_steps={prior} is not above 1; Banino et al. use 5.")
        need(self.prior_weight > 0, f"model.halting.prior_weight={self.prior_weight} is not positive; Banino et al. use 0.01.")
        need(
            not is_ponder or self.time_penalty is None,
            f"model.halting.time_penalty={self.time_penalty} has no meaning for kind=ponder; set prior_steps.",
        )
        target, decides = self.target_steps, self.kind in {HaltingKind.act, HaltingKind.ponder}
        need(target is None or decides, f"model.halting.target_steps={target} needs kind=act or ponder; kind={self.kind}.")
        need(
            target is None or 1 <= target <= self.max_steps,
            f"model.halting.target_steps={target} is outside 1..{self.max_steps} (model.halting.max_steps).",
        )
        for name in ("time_penalty", "prior_steps"):
            value = getattr(self, name)
            need(
                target is None or value is None,
                f"model.halting.target_steps={target} finds the penalty itself, but {name}={value}; set one of them.",
            )
        need(is_ponder or prior is None, f"model.halting.prior_steps={prior} needs kind=ponder; for act set time_penalty.")


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """A model; both research axes, `tree` and `halting`, are part of every one."""

    name: str = ModelName.transformer.value
    """transformer: a weight-tied causal block over bytes. rnn, mlp: a recurrent cell, or a residual block, over bytes or
    vectors. Any other: an entry point of the group distcond.models."""
    options: dict[str, Any] = field(default_factory=dict)
    "What an entry point reads beside the other keys; those that ship have none."
    width: int = 128
    "Size of the state of a position (transformer, mlp) or of the recurrent state (rnn); >= 1."
    heads: int = 4
    "Attention heads; divides width (transformer)."
    feed_forward: int = 512
    "Hidden units of the feed-forward part (transformer); >= 1."
    cell: CellName = CellName.tanh
    "Recurrent cell, whose matrix is the tree (rnn)."
    window: int = 16
    "Bytes that a prediction is made from (mlp on text); >= 1."
    tree: TreeConfig = field(default_factory=TreeConfig)
    "The tree of weights."
    halting: HaltingConfig = field(default_factory=HaltingConfig)
    "The number of ponder steps."

    def matrices(self, input_size: int = 0) -> dict[str, Matrix]:
        """The layers that may be trees by name, first the one that is a tree where `tree.layers` names none.

        input_size: numbers of an element, which the matrix of an rnn reads beside the state.
        """
        width, hidden = self.width, self.feed_forward
        if self.name == ModelName.transformer:
            feed_forward = {"up": Matrix(width, hidden), "down": Matrix(hidden, width)}
            return {**feed_forward, "qkv": Matrix(width, 3 * width, False), "merge": Matrix(width, width, False)}
        if self.name == ModelName.mlp:
            return {"linear": Matrix(width, width)}
        return {"linear": Matrix(input_size + 1 + width, (1 if self.cell == CellName.tanh else 4) * width)}

    @property
    def tree_layers(self) -> list[str]:
        """Names of the layers that are trees, if `tree.depth` is above 0."""
        return self.tree.layers or list(self.matrices())[:1]

    @property
    def is_shipped(self) -> bool:
        """Whether distcond brings this model, else another package does."""
        return self.name in {*ModelName}

    def __post_init__(self) -> None:
        check_name("model", self.name, tuple(ModelName), self.options)
        need(self.width >= 1, f"model.width={self.width} is below 1; use 1 or more.")
        need(self.feed_forward >= 1, f"model.feed_forward={self.feed_forward} is below 1; use 1 or more.")
        need(self.window >= 1, f"model.window={self.window} is below 1; use 1 or more.")
        need(
            self.name != ModelName.transformer or (self.heads >= 1 and self.width % self.heads == 0),
            f"model.width={self.width} is not divisible by model.heads={self.heads}; use a number of heads that divides it.",
        )
        if self.is_shipped:
            self._check_layers()
        else:
            need(
                not self.tree.layers,
                f"model.tree.layers={self.tree.layers} is for models that ship with distcond; model.name={self.name} chooses its "
                "own trees: leave it empty.",
            )

    def _check_layers(self) -> None:
        """Refuse trees that a layer of this model cannot be."""
        tree, matrices = self.tree, self.matrices()
        for layer in tree.layers:
            wrong = "is no layer of model.name=" + self.name if layer not in matrices else "is there twice"
            need(
                layer in matrices and tree.layers.count(layer) == 1,
                f"model.tree.layers={tree.layers}: {layer} {wrong}; use some of {', '.join(matrices)}, each once.",
            )
        bits = tree.num_trees * tree.depth
        for layer in self.tree_layers:
            outputs = matrices[layer].outputs
            inputs = self.width if self.name == ModelName.rnn else matrices[layer].inputs
            need(
                tree.gate != GateName.sign or bits <= inputs,
                f"model.tree.gate=sign takes {bits} bits (model.tree.num_trees x model.tree.depth) from the inputs of {layer}, "
                f"which has {inputs} (model.width={self.width}); use a smaller depth.",
            )
            need(
                outputs % tree.num_trees == 0,
                f"model.tree.num_trees={tree.num_trees} does not divide the {outputs} outputs of the tree layer {layer}; "
                f"use {nearest_divisors(outputs, tree.num_trees)}.",
            )
