"""Where computation goes: groups, shares and marks add up to what was seen."""

from pathlib import Path

import pytest
import torch

from distcond.data.tasks import build_task
from distcond.report.probe import probe
from distcond.report.spending import SHADES, _shade, spending
from distcond.train.learner import learner_for
from tests.helpers import small_config


@pytest.mark.parametrize("name", ["logic", "sort", "parity"])
def test_a_task_is_told_apart_by_its_difficulty(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"data__max_length": 4, "data__max_gates": 3, "data__num_bits": 8}
    config = small_config(tmp_path, data__name=name, **sizes, model__tree__full_depth=None)
    task = build_task(config.data)
    learner = learner_for(config, task).eval()
    with torch.no_grad():
        learner.body.ponder.halting.weight.normal_(std=16)  # type: ignore[union-attr]
    seen = probe(learner, task, 64)
    spent = spending(task, seen)
    positions = seen.positions
    steps = positions.steps[positions.valid]
    assert len(steps) == spent.positions == seen.batch.lengths.sum() and len(set(steps.tolist())) > 1
    assert sum(share for _, share in spent.histogram) == pytest.approx(1)
    assert sum(number * share for number, share in spent.histogram) == pytest.approx(steps.mean())
    assert spent.excerpt == [] and spent.by == {"logic": "gates", "sort": "", "parity": "set_bits"}[name]
    for key, part in (
        (("steps", positions.steps), ("loss", positions.loss_bits), ("wrong", positions.wrong > 0)) if spent.groups else ()
    ):
        mean = sum(group.share * getattr(group, key) for group in spent.groups)
        assert mean == pytest.approx(part[positions.valid].mean(), rel=1e-5)


def test_bars_reach_from_the_least_to_the_most() -> None:
    assert [_shade(value, 1.0, 4.0) for value in (1.0, 2.5, 4.0, 9.0)] == [0, SHADES // 2, SHADES - 1, SHADES - 1]
    assert _shade(2.0, 2.0, 2.0) == 0
