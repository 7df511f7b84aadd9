"""Models from their configuration, and the sums they report: losses, errors, ponder steps.

Every figure is a sum with its own count, so that ranks and micro-batches add up exactly; means are taken at the end.
"""

import torch
from torch import Tensor, nn

from distcond.config import CellName, HaltingConfig, HaltingKind, ModelConfig, ModelName, TreeConfig
from distcond.nn.cells import CELLS
from distcond.nn.halting import AdaptiveComputation, Drafts, FixedComputation
from distcond.nn.linear import TreeOptions
from distcond.nn.mlp import ResidualCell, VectorMLP, WindowMLP
from distcond.nn.pondernet import PonderNet
from distcond.nn.recurrent import Recurrent
from distcond.nn.transformer import Block, Transformer

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
    "entropy",  # of the halting distributions in nats, where the loss holds it
)


class Learner(nn.Module):
    """A model together with its loss: task loss + time_penalty x ponder cost - entropy_weight x entropy of halting.

    With PonderNet the task loss in training is the mean over its steps, and the rest beta times its regulariser, up to a
    constant, if entropy_weight is beta and time_penalty is -beta log(1 - lambda_p).

    is_text: bytes or tokens, of which each one is a target; num_classes: the vocabulary. Else C, outputs are groups of C
    with one target class each; 1: every output is a binary target of its own.
    """

    def __init__(
        self, body: nn.Module, *, is_text: bool, time_penalty: float, entropy_weight: float = 0.0, num_classes: int = 1
    ) -> None:
        super().__init__()
        self.body, self.is_text, self.time_penalty, self.entropy_weight = body, is_text, time_penalty, entropy_weight
        self.num_classes = num_classes

    def forward(self, inputs: Tensor, targets: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Loss summed over the batch, and the figures of SUMS, float64.

        inputs: bytes or tokens [B, T], or vectors [B, T, I]; targets: bytes or tokens [B, T], 0/1 [B, T, O] or classes
        [B, T, G], below 0 where nothing is asked; lengths int64 [B].
        """
        logits, stats = self.body(inputs, lengths)
        valid_BT = torch.arange(logits.shape[1], device=lengths.device) < lengths[:, None]
        nll_BT, wrong_BTG, asked_BTG = self.compare(logits, targets)
        entropy = nll_BT.new_zeros(())
        if stats.drafts is not None:
            nll_BT, entropy = self._mean_over_steps(stats.drafts, targets, valid_BT)
        nll = torch.where(valid_BT, nll_BT, 0.0).sum()
        steps, remainder, cost = (_total(part, valid_BT) for part in (stats.steps, stats.remainder, stats.ponder_cost))
        loss = nll + self.time_penalty * cost
        if stats.drafts is not None:
            loss = loss - self.entropy_weight * entropy
        asked_BTG = asked_BTG & valid_BT[:, :, None]
        wrong_BTG = wrong_BTG & asked_BTG
        sums = (
            nll, cost, steps, remainder, lengths.sum(),
            asked_BTG.sum(), wrong_BTG.sum(), (lengths > 0).sum(), wrong_BTG.flatten(1).any(1).sum(),
            asked_BTG.flatten(1).any(1).sum(), entropy,
        )  # fmt: skip
        return loss, torch.stack([figure.detach().double() for figure in sums])

    def compare(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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

    def _mean_over_steps(self, drafts: Drafts, targets: Tensor, valid_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood of each place, weighted over its steps [B, T]; sum of the entropies of the weights."""
        targets_S = targets.flatten(0, 1)[drafts.rows]
        nll_S = self.compare(drafts.value[:, None], targets_S[:, None])[0][:, 0]
        nll_BT = nll_S.new_zeros(valid_BT.numel()).index_add(0, drafts.rows, nll_S * drafts.weight.float()).view_as(valid_BT)
        # NOTE: the gradient of p log p is infinite at p = 0.
        entropy_S = torch.special.entr(drafts.weight.clamp(min=torch.finfo(drafts.weight.dtype).tiny))
        return nll_BT, torch.where(valid_BT.flatten()[drafts.rows], entropy_S, 0.0).sum()


def _total(part: Tensor, valid_BT: Tensor) -> Tensor:
    """Sum over the valid ones of B x T positions."""
    return torch.where(valid_BT, part.view_as(valid_BT), 0).sum(1).sum()


def build_learner(config: ModelConfig, *, is_text: bool, input_size: int, output_size: int, num_classes: int = 1) -> Learner:
    """The model of a configuration for a task of these sizes, with fresh parameters from torch's generator."""
    body = _build_body(config, is_text, input_size, output_size)
    return with_loss(body, config, is_text=is_text, num_classes=output_size if is_text else num_classes)


def with_loss(body: nn.Module, config: ModelConfig, *, is_text: bool, num_classes: int) -> Learner:
    """A model with the loss of its configuration."""
    return Learner(
        body,
        is_text=is_text,
        time_penalty=config.halting.initial_penalty,
        entropy_weight=config.halting.prior_weight,
        num_classes=num_classes,
    )


def _build_body(config: ModelConfig, is_text: bool, input_size: int, output_size: int) -> nn.Module:
    tree = tree_options(config.tree)
    if config.name == ModelName.transformer:
        block = Block(config.width, config.heads, config.feed_forward, tree, config.tree_layers)
        return Transformer(block, pondering(block, config.width, config.halting), config.width, output_size)
    if config.name == ModelName.mlp:
        ponder = pondering(ResidualCell(config.width, tree), config.width, config.halting)
        if is_text:
            return WindowMLP(ponder, config.width, config.window, output_size)
        return VectorMLP(ponder, input_size, config.width, output_size)
    cell = CELLS[config.cell](input_size + 1, config.width, tree)
    ponder = pondering(cell, config.width, config.halting)
    return Recurrent(ponder, config.width, 2 if config.cell == CellName.lstm else 1, output_size, input_size)


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


def pondering(cell: nn.Module, width: int, halting: HaltingConfig) -> nn.Module:
    """A cell with a state of `width` numbers a row under the halting of a configuration: module(x, state) -> state, stats."""
    if halting.kind in {HaltingKind.act, HaltingKind.ponder}:
        kind = AdaptiveComputation if halting.kind == HaltingKind.act else PonderNet
        ponder = kind(cell, width, halting.max_steps, halting.least_left, halting.halting_bias)
        ponder.skips_nan = True  # the engine skips a step that is not finite
        return ponder
    return FixedComputation(cell, halting.max_steps if halting.kind == HaltingKind.fixed else 1)
