"""Models from their configuration, and the sums they report: losses, errors, ponder steps.

Every figure is a sum with its own count, so that ranks and micro-batches add up exactly; means are taken at the end.
"""

import torch
from torch import Tensor, nn

from distcond.config import CellName, HaltingConfig, HaltingKind, ModelConfig, ModelName, TreeConfig
from distcond.nn.halting import AdaptiveComputation, FixedComputation, PonderStats
from distcond.nn.linear import TreeOptions
from distcond.nn.mlp import ResidualCell, VectorMLP, WindowMLP
from distcond.nn.recurrent import CELLS, Recurrent
from distcond.nn.transformer import VOCABULARY, Block, Transformer

SUMS = (
    "nll",  # negative log-likelihood in nats
    "ponder_cost",  # N + R
    "ponder_steps",  # N
    "remainder",  # R
    "positions",  # what ponder figures are averaged over: elements of sequences
    "elements",  # predicted elements
    "element_errors",
    "sequences",
    "sequence_errors",  # sequences with any mistake
    "asked_sequences",  # sequences with any target
)


class Learner(nn.Module):
    """A model together with its loss.

    is_text: bytes, of which each one is a target. num_classes: C, outputs are groups of C with one target class each; 1:
    every output is a binary target of its own.
    """

    def __init__(self, body: nn.Module, *, is_text: bool, time_penalty: float, num_classes: int = 1) -> None:
        super().__init__()
        self.body, self.is_text, self.time_penalty = body, is_text, time_penalty
        self.num_classes = VOCABULARY if is_text else num_classes

    def forward(self, inputs: Tensor, targets: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Loss summed over the batch (task loss + time_penalty x ponder cost), and the figures of SUMS, float64.

        inputs: bytes [B, T] or vectors [B, T, I]; targets: bytes [B, T], 0/1 [B, T, O] or classes [B, T, G], below 0 where
        nothing is asked; lengths int64 [B].
        """
        logits, stats = self.body(inputs, lengths)
        valid_BT = torch.arange(logits.shape[1], device=lengths.device) < lengths[:, None]
        if self.is_text:
            stats = _per_sequence(stats, valid_BT)
        nll_BT, wrong_BTG, asked_BTG = self._compare(logits, targets)
        nll = torch.where(valid_BT, nll_BT, 0.0).sum()
        loss = nll + self.time_penalty * stats.ponder_cost.sum()
        asked_BTG = asked_BTG & valid_BT[:, :, None]
        wrong_BTG = wrong_BTG & asked_BTG
        sums = (
            nll, stats.ponder_cost.sum(), stats.steps.sum(), stats.remainder.sum(), lengths.sum(),
            asked_BTG.sum(), wrong_BTG.sum(), (lengths > 0).sum(), wrong_BTG.flatten(1).any(1).sum(),
            asked_BTG.flatten(1).any(1).sum(),
        )  # fmt: skip
        return loss, torch.stack([figure.detach().double() for figure in sums])

    def _compare(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Negative log-likelihood [B, T]; which of the G targets of a place are missed, and which are asked for [B, T, G]."""
        if self.num_classes == 1:
            nll_BTG = nn.functional.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none")
            return nll_BTG.sum(2), (logits > 0) != (targets > 0.5), torch.ones_like(targets, dtype=torch.bool)
        class_BTG = targets.long().view(*targets.shape[:2], -1)
        logits_BTGC = logits.view(*class_BTG.shape, self.num_classes)
        asked_BTG = class_BTG >= 0
        nll = nn.functional.cross_entropy(logits_BTGC.flatten(0, 2).float(), class_BTG.flatten().clamp(min=0), reduction="none")
        nll_BTG = torch.where(asked_BTG, nll.view_as(class_BTG), 0.0)
        return nll_BTG.sum(2), logits_BTGC.argmax(-1) != class_BTG, asked_BTG


def _per_sequence(stats: PonderStats, valid_BT: Tensor) -> PonderStats:
    """Stats of all B x T positions, summed over the valid positions of each sequence."""
    parts = (part.view_as(valid_BT) for part in (stats.steps, stats.remainder, stats.ponder_cost))
    return PonderStats(*(torch.where(valid_BT, part, 0).sum(1) for part in parts))


def build_learner(config: ModelConfig, *, is_text: bool, input_size: int, output_size: int, num_classes: int = 1) -> Learner:
    """The model of a configuration for a task of these sizes, with fresh parameters from torch's generator."""
    tree = tree_options(config.tree)
    if config.name == ModelName.transformer:
        block = Block(config.width, config.heads, config.feed_forward, tree)
        ponder = _ponder(block, config.width, config.halting)
        body: nn.Module = Transformer(block, ponder, config.width)
    elif config.name == ModelName.mlp:
        ponder = _ponder(ResidualCell(config.width, tree), config.width, config.halting)
        if is_text:
            body = WindowMLP(ponder, config.width, config.window)
        else:
            body = VectorMLP(ponder, input_size, config.width, output_size)
    else:
        cell = CELLS[config.cell](input_size + 1, config.width, tree)
        ponder = _ponder(cell, config.width, config.halting)
        body = Recurrent(ponder, config.width, 2 if config.cell == CellName.lstm else 1, output_size)
    return Learner(body, is_text=is_text, time_penalty=config.halting.time_penalty, num_classes=num_classes)


def tree_options(config: TreeConfig) -> TreeOptions:
    """A tree's configuration as plain values."""
    return TreeOptions(
        depth=config.depth,
        full_depth=config.deepest_full_level,
        rank=config.rank,
        gate=config.gate.value,
        gate_gradient=config.gate_gradient.value,
        storage=config.storage.value,
        num_trees=config.num_trees,
        min_visits=config.min_visits,
        max_nodes=config.max_nodes,
    )


def _ponder(cell: nn.Module, width: int, halting: HaltingConfig) -> nn.Module:
    if halting.kind == HaltingKind.act:
        return AdaptiveComputation(cell, width, halting.max_steps, halting.epsilon, halting.halting_bias)
    return FixedComputation(cell, halting.max_steps if halting.kind == HaltingKind.fixed else 1)
