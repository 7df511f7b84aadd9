"""Models and their sums: what is counted, what is averaged over, and that parts of a batch add up to the whole."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distcond.config import CellName, HaltingConfig, HaltingKind, ModelConfig, ModelName, TreeConfig
from distcond.nn import AdaptiveComputation, FixedComputation, PonderNet, PonderStats, TreeLinear
from distcond.nn.model import SUMS, Learner, build_learner
from tests.trees import seed_cpu

LENGTHS = torch.tensor([4, 2, 0, 3])
EXACT = {"rtol": 1e-12, "atol": 1e-12}


class Given(nn.Module):
    """A body that answers with given logits and stats."""

    def __init__(self, logits: Tensor, stats: PonderStats) -> None:
        super().__init__()
        self.answer = logits, stats

    def forward(self, inputs: Tensor, lengths: Tensor) -> tuple[Tensor, PonderStats]:
        return self.answer


def config(name: ModelName, kind: HaltingKind, **options: Any) -> ModelConfig:
    return ModelConfig(
        name=name, width=8, heads=2, feed_forward=16, tree=TreeConfig(depth=2, rank=2, full_depth=1),
        halting=HaltingConfig(kind=kind, max_steps=3, time_penalty=None if kind == HaltingKind.ponder else 0.1), **options,
    )  # fmt: skip


def build(name: ModelName, kind: HaltingKind = HaltingKind.act, **options: Any) -> Learner:
    seed_cpu(0)
    is_text = name == ModelName.transformer
    return build_learner(
        config(name, kind, **options), is_text=is_text, input_size=256 if is_text else 3, output_size=256 if is_text else 2
    ).double()


def batch_for(name: ModelName) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if name == ModelName.transformer:
        text = torch.randint(256, (2, 4, 4), dtype=torch.uint8, generator=generator)
        return text[0], text[1], LENGTHS
    inputs = torch.randn(4, 4, 3, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(2, (4, 4, 2), generator=generator).double(), LENGTHS


def by_name(sums: Tensor) -> dict[str, float]:
    return dict(zip(SUMS, sums.tolist(), strict=True))


def test_text_sums_count_bytes_within_their_lengths_only() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 4, 256, generator=generator, dtype=torch.float32)
    targets = torch.randint(256, (4, 4), dtype=torch.uint8, generator=generator)
    targets[0, :2] = logits[0, :2].argmax(-1).to(torch.uint8)
    targets[1, :2] = logits[1, :2].argmax(-1).to(torch.uint8)  # the whole of sequence 1 is right
    steps = torch.arange(1, 17)
    remainder = torch.linspace(0, 1, 16)
    body = Given(logits, PonderStats(steps, remainder, steps + remainder))
    learner = Learner(body, is_text=True, time_penalty=0.5, num_classes=256)
    loss, sums = learner(targets, targets, LENGTHS)
    places = [(row, time) for row, length in enumerate(LENGTHS.tolist()) for time in range(length)]
    nll = sum(-logits[row, time].double().log_softmax(0)[int(targets[row, time])].item() for row, time in places)
    wrong = [(row, time) for row, time in places if int(logits[row, time].argmax()) != int(targets[row, time])]
    expected = {
        "nll": nll,
        "ponder_steps": sum(4 * row + time + 1 for row, time in places),
        "remainder": sum((4 * row + time) / 15 for row, time in places),
        "positions": 9,
        "elements": 9,
        "element_errors": len(wrong),
        "sequences": 3,
        "sequence_errors": len({row for row, _ in wrong}),
        "asked_sequences": 3,
        "entropy": 0,
    }
    expected["ponder_cost"] = expected["ponder_steps"] + expected["remainder"]
    assert by_name(sums) == pytest.approx(expected, rel=1e-6)  # float32 logits
    assert sums.dtype == torch.float64 and not sums.requires_grad
    assert loss.item() == pytest.approx(nll + 0.5 * expected["ponder_cost"], rel=1e-6)
    assert 1 <= expected["element_errors"] <= 6 and expected["sequence_errors"] == 2


def test_vector_sums_count_every_output_and_a_sequence_with_any_mistake() -> None:
    logits = torch.tensor([[[3.0, -3.0], [-1.0, 2.0]], [[1.0, 1.0], [9.0, 9.0]]])
    targets = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 0.0]]])  # one mistake, then two out of reach
    steps, remainder = torch.tensor([3, 2, 2, 9]), torch.tensor([0.25, 0.25, 0.25, 0.5])  # the last one out of reach
    stats = PonderStats(steps, remainder, steps + remainder)
    loss, sums = Learner(Given(logits, stats), is_text=False, time_penalty=2.0)(logits, targets, torch.tensor([2, 1]))
    margins = [3.0, 3.0, 1.0, 2.0, 1.0, -1.0]  # how far each output within its length is on the right side
    nll = sum(torch.nn.functional.softplus(torch.tensor(-margin)).item() for margin in margins)
    assert by_name(sums) == pytest.approx(
        {
            "nll": nll, "ponder_cost": 7.75, "ponder_steps": 7, "remainder": 0.75, "positions": 3,
            "elements": 6, "element_errors": 1, "sequences": 2, "sequence_errors": 1,
            "asked_sequences": 2, "entropy": 0,
        }, rel=1e-6,
    )  # fmt: skip
    assert loss.item() == pytest.approx(nll + 2 * 7.75, rel=1e-6)


def test_class_sums_count_the_targets_that_are_asked_for() -> None:
    """Two groups of three classes; sequence 0 is asked nothing, 1 is right at its one target, 2 misses one of three."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 2, 6, generator=generator)
    best = logits.view(3, 2, 2, 3).argmax(-1)
    targets = torch.full((3, 2, 2), -1)
    targets[1, 1, 0] = best[1, 1, 0]
    targets[2, 0] = best[2, 0]
    targets[2, 1, 1] = (best[2, 1, 1] + 1) % 3
    targets[0, 1] = 0  # beyond the length of sequence 0
    stats = PonderStats(torch.ones(6, dtype=torch.int64), torch.zeros(6), torch.ones(6))
    learner = Learner(Given(logits.requires_grad_(), stats), is_text=False, time_penalty=0.0, num_classes=3)
    loss, sums = learner(torch.zeros(3, 2, 1), targets, torch.tensor([1, 2, 2]))
    asked = [(1, 1, 0), (2, 0, 0), (2, 0, 1), (2, 1, 1)]
    likelihood = logits.double().view(3, 2, 2, 3).log_softmax(-1)
    nll = -sum(likelihood[place][int(targets[place])].item() for place in asked)
    assert loss.item() == pytest.approx(nll, rel=1e-6)
    figures = by_name(sums)
    assert (figures["elements"], figures["element_errors"], figures["positions"]) == (4, 1, 5)
    assert (figures["sequences"], figures["asked_sequences"], figures["sequence_errors"]) == (3, 2, 1)
    loss.backward()
    assert logits.grad is not None
    touched = logits.grad.view(3, 2, 2, 3).abs().sum(-1).nonzero().tolist()
    assert touched == [list(place) for place in asked]


@pytest.mark.parametrize("kind", list(HaltingKind))
@pytest.mark.parametrize("name", list(ModelName))
def test_parts_of_a_batch_add_up_to_the_whole_in_loss_sums_and_gradient(name: ModelName, kind: HaltingKind) -> None:
    batch = batch_for(name)
    results = []
    for parts in ([slice(0, 4)], [slice(0, 1), slice(1, 4)]):
        learner = build(name, kind)
        outcomes = [learner(*(tensor[part] for tensor in batch)) for part in parts]
        loss = torch.stack([loss for loss, _ in outcomes]).sum()
        loss.backward()
        grads = [value.grad for value in learner.parameters()]
        assert all(grad is not None for grad in grads)
        results.append((loss, torch.stack([sums for _, sums in outcomes]).sum(0), grads))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)  # losses are float32


@pytest.mark.parametrize("kind", [HaltingKind.act, HaltingKind.ponder])
@pytest.mark.parametrize("name", list(ModelName))
def test_what_lies_beyond_the_lengths_does_not_matter(name: ModelName, kind: HaltingKind) -> None:
    learner = build(name, kind)
    for module in learner.modules():
        if isinstance(module, TreeLinear):
            module.eval()  # its thresholds follow every token that it sees
    inputs, targets, lengths = batch_for(name)
    loss, sums = learner(inputs, targets, lengths)
    for row, length in enumerate(lengths.tolist()):
        inputs[row, length:], targets[row, length:] = 1, 1
    other_loss, other_sums = learner(inputs, targets, lengths)
    torch.testing.assert_close((loss, sums), (other_loss, other_sums), **EXACT)


@pytest.mark.parametrize("name", list(ModelName))
@pytest.mark.parametrize(("kind", "steps"), [(HaltingKind.none, 1), (HaltingKind.fixed, 3)])
def test_controls_take_their_steps_at_every_position(name: ModelName, kind: HaltingKind, steps: int) -> None:
    learner = build(name, kind)
    figures = by_name(learner(*batch_for(name))[1])
    assert figures["positions"] == 9 and figures["remainder"] == 0
    assert figures["ponder_steps"] == figures["ponder_cost"] == 9 * steps
    assert not [module for module in learner.modules() if isinstance(module, AdaptiveComputation)]


@pytest.mark.parametrize("name", list(ModelName))
def test_with_pondernet_training_weighs_the_steps_and_evaluation_takes_the_median_one(name: ModelName) -> None:
    learner = build(name, HaltingKind.ponder)
    for module in learner.modules():
        if isinstance(module, TreeLinear):
            module.eval()
    inputs, targets, lengths = batch_for(name)
    loss, sums = learner(inputs, targets, lengths)
    drafts = learner.body(inputs, lengths)[1].drafts
    valid = torch.arange(4) < lengths[:, None]
    nll = entropy = mean_steps = 0.0
    for place in range(16):
        sequence, time = divmod(place, 4)
        if not valid[sequence, time]:
            continue
        chosen = drafts.rows == place
        weights, logits = drafts.weight[chosen].tolist(), drafts.value[chosen].float()
        assert len(weights) == 3 and sum(weights) == pytest.approx(1)  # sigmoid(1): 0.02 is left after three steps
        for number, (weight, answer) in enumerate(zip(weights, logits, strict=True), start=1):
            target = targets[sequence, time]
            if name == ModelName.transformer:
                nll -= weight * answer.log_softmax(0)[int(target)].item()
            else:
                nll += weight * nn.functional.binary_cross_entropy_with_logits(answer, target.float(), reduction="sum").item()
            entropy -= weight * math.log(weight)
            mean_steps += weight * number
    figures = by_name(sums)
    assert (figures["nll"], figures["entropy"], figures["ponder_cost"]) == pytest.approx((nll, entropy, mean_steps), rel=1e-5)
    beta, slope = 0.01, -math.log(1 - 1 / 5)  # the published defaults
    assert loss.item() == pytest.approx(nll + beta * (slope * mean_steps - entropy), rel=1e-5)
    _, evaluated = learner.eval()(inputs, targets, lengths)
    assert by_name(evaluated)["ponder_steps"] == 9 and by_name(evaluated)["entropy"] == 0  # sigmoid(1) > 1/2: one step each


def test_options_reach_their_modules() -> None:
    halting = HaltingConfig(kind=HaltingKind.act, max_steps=7, epsilon=0.2, time_penalty=0.3, halting_bias=2.0)
    tree_config = TreeConfig(depth=3, full_depth=1, rank=5)
    model_config = ModelConfig(name=ModelName.rnn, cell=CellName.lstm, width=8, halting=halting, tree=tree_config)
    learner = build_learner(model_config, is_text=False, input_size=3, output_size=2)
    ponder = next(module for module in learner.modules() if isinstance(module, AdaptiveComputation))
    assert (ponder.max_steps, ponder.epsilon, ponder.halting.bias.item(), learner.time_penalty) == (7, 0.2, 2.0, 0.3)
    tree = ponder.cell.linear
    assert (tree.in_features, tree.out_features, tree.depth, tree.full_depth, tree.rank) == (12, 32, 3, 1, 5)
    halting = HaltingConfig(kind=HaltingKind.ponder, max_steps=7, prior_steps=2.0, prior_weight=0.3)
    learner = build_learner(ModelConfig(name=ModelName.rnn, halting=halting), is_text=False, input_size=3, output_size=2)
    pondernet = next(module for module in learner.modules() if isinstance(module, PonderNet))
    assert (pondernet.max_steps, pondernet.epsilon, learner.entropy_weight) == (7, 0.05, 0.3)
    assert learner.time_penalty == pytest.approx(0.3 * math.log(2))
    fixed = next(m for m in build(ModelName.rnn, HaltingKind.fixed).modules() if isinstance(m, FixedComputation))
    assert fixed.num_steps == 3
