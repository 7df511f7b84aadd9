"""Samples of a validation: what they are, and that they are those of the validation itself."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from distcond.compose import save_config
from distcond.config import Config
from distcond.data.batches import LocalFeeder
from distcond.nn.halting import PonderStats
from distcond.nn.model import Learner
from distcond.opened import open_run
from distcond.train.samples import first_answer, samples_of
from tests.helpers import small_config, train_run


class _Answers(torch.nn.Module):
    """A body that gives logits, and n steps at position n."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, inputs: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, PonderStats]:
        steps = torch.arange(inputs.shape[0] * inputs.shape[1])
        return self.logits, PonderStats(steps, torch.zeros(len(steps)), steps.float())


def ask(logits: torch.Tensor, given: tuple[torch.Tensor, ...], number: int, **options: Any) -> list[dict[str, Any]]:
    learner = Learner(_Answers(logits), time_penalty=0.0, **options)
    with first_answer(learner) as seen:
        learner(*given)
        learner(*(part.flip(0) for part in given))  # the second batch does not matter
    assert not learner._forward_pre_hooks and not learner.body._forward_hooks
    return samples_of(learner, seen, number)


def test_a_sample_of_text_is_text() -> None:
    text = torch.tensor([list(b"abc"), list("né".encode())], dtype=torch.uint8)
    logits = torch.nn.functional.one_hot(torch.tensor([list(b"bcx"), list("né".encode())]), 256).float()
    targets = torch.tensor([list(b"bcd"), list("né".encode())], dtype=torch.uint8)
    first, second = ask(logits, (text, targets, torch.tensor([3, 3])), 5, is_text=True, num_classes=256)
    sure, unsure = round(math.log2(math.e + 255) - math.log2(math.e), 3), round(math.log2(math.e + 255), 3)
    shown = {"input": "abc", "target": "bcd", "prediction": "bcx", "wrong": 1, "steps": [0, 1, 2], "loss": [sure, sure, unsure]}
    assert {key: first[key] for key in shown} == shown and first["entropy"] == [first["entropy"][0]] * 3
    assert sure < first["entropy"][0] < 8  # of 256 bytes nearly alike
    assert (second["prediction"], second["wrong"], second["steps"]) == ("né", 0, [3, 4, 5])


def test_a_sample_of_vectors_is_lists_and_ends_with_its_length() -> None:
    inputs, targets = torch.tensor([[[1.0, -1.0], [0.25, 0.0]]] * 3), torch.tensor([[[1.0], [0.0]]] * 3)
    given = (inputs, targets, torch.tensor([2, 1, 0]))
    first, second = ask(torch.tensor([[[2.0], [1.0]]] * 3), given, 5, is_text=False)
    shown = {"input": [[1, -1], [0.25, 0]], "target": [[1], [0]], "prediction": [[1], [1]]}
    assert first == {"example": 0, **shown, "wrong": 1, "steps": [0, 1]}
    assert (second["input"], second["wrong"], second["steps"]) == ([[1, -1]], 0, [2])
    assert (
        len(ask(torch.zeros(3, 2, 1), given, 1, is_text=False)) == 1 and ask(torch.zeros(3, 2, 1), given, 0, is_text=False) == []
    )


def test_a_sample_of_tokens_is_ids() -> None:
    tokens = torch.tensor([[300, 7]], dtype=torch.int32)
    given = (tokens, tokens, torch.tensor([2]))
    (sample,) = ask(torch.nn.functional.one_hot(tokens.long(), 400).float(), given, 1, is_text=True, num_classes=400)
    assert (sample["input"], sample["prediction"], sample["wrong"]) == ([[300], [7]], [[300], [7]], 0)


def test_what_is_not_asked_is_not_wrong() -> None:
    targets = torch.tensor([[[2, -1]]])
    (sample,) = ask(torch.zeros(1, 1, 6), (torch.zeros(1, 1, 1), targets, torch.tensor([1])), 1, is_text=False, num_classes=3)
    assert (sample["target"], sample["prediction"], sample["wrong"]) == ([[2, -1]], [[0, 0]], 1)


def samples_in(config: Config) -> list[dict[str, Any]]:
    file = Path(config.run.dir) / config.run.name / "eval" / "samples.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.thorough)])
@pytest.mark.thorough
def test_each_validation_keeps_the_first_examples_and_a_resumed_run_each_once(tmp_path: Path, stage: int) -> None:
    changes = {"cluster__num_workers": 2, "optim__zero_stage": stage, "tracking__samples": 3}
    train_run(small_config(tmp_path, train__max_steps=2, **changes))
    config = small_config(tmp_path, train__max_steps=4, **changes)
    train_run(config)
    kept = samples_in(config)
    assert [line["step"] for line in kept] == [2, 4] and [len(line["samples"]) for line in kept] == [3, 3]
    feeder = LocalFeeder(config, rank=0, world_size=1)
    save_config(config, tmp_path / "run" / "config.yaml")
    learner = open_run(tmp_path / "run", step=4).learner
    batch = feeder.validation(0)
    with first_answer(learner) as seen, torch.no_grad():
        learner(*(torch.from_numpy(part) for part in (batch.inputs, batch.targets, batch.lengths)))
    assert kept[-1]["samples"] == samples_of(learner, seen, 3)
    assert kept[0]["samples"][0]["input"] == kept[1]["samples"][0]["input"]


def test_no_samples_no_file(tmp_path: Path) -> None:
    config = small_config(tmp_path, tracking__samples=0, cluster__num_workers=1, train__max_steps=2)
    train_run(config)
    assert not (tmp_path / "run" / "eval").exists()
