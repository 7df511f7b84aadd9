"""Mixtures of texts: what is drawn, how often, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distcond.cli import main
from distcond.compose import compose
from distcond.config import Config, DataConfig
from distcond.data import LocalFeeder, build_task
from distcond.data.mixture import Mixture, allotted
from tests.data.test_batches import assert_equal, concatenate
from tests.helpers import changed

WEIGHTS = {"a": 5, "b": 2.0, "c": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text for each source, of nothing but its letter; in validation, of its capital."""
    folder = tmp_path_factory.mktemp("mixture")
    for index, source in enumerate(WEIGHTS):
        (folder / f"{source}.txt").write_text(source * (300 * (index + 1)) + source.upper() * 100)
    return folder


def sources_of(folder: Path) -> dict[str, Any]:
    def fraction(source: str) -> float:
        size = (folder / f"{source}.txt").stat().st_size
        return 100 / size

    return {
        source: {
            "name": "text",
            "files": [str(folder / f"{source}.txt")],
            "weight": weight,
            "validation_fraction": fraction(source),
        }
        for source, weight in WEIGHTS.items()
    }


def mixture(folder: Path, sources: dict[str, Any] | None = None, **more: Any) -> Mixture:
    settings = {"context": 16, "cache_dir": str(folder / "cache"), "validation_examples": 24, **more}
    task = build_task(DataConfig(name="mixture", sources=sources or sources_of(folder), **settings))
    assert isinstance(task, Mixture)
    return task


def letters(inputs: np.ndarray) -> str:
    """The letter of each row, which is of one text alone."""
    assert (inputs == inputs[:, :1]).all()
    return bytes(inputs[:, 0].tolist()).decode()


def test_every_row_is_of_the_source_that_was_drawn_for_it(folder: Path) -> None:
    task = mixture(folder)
    batch = task.rows(0, 3, 200)
    assert letters(batch.inputs) == "".join("abc"[index] for index in task.source_of(0, 3, 200))
    assert letters(batch.targets) == letters(batch.inputs)
    assert batch.global_count == 200 * 16 and batch.lengths.tolist() == [16] * 200


def test_shares_are_the_weights(folder: Path) -> None:
    """Of 80,000 rows: four standard errors of a share p are 4 sqrt(p (1 - p) / 80,000), at most 0.007."""
    task = mixture(folder)
    drawn = np.concatenate([task.source_of(1, step, 200) for step in range(400)])
    shares = np.bincount(drawn, minlength=3) / len(drawn)
    expected = np.array([5, 2, 1]) / 8
    assert (abs(shares - expected) < 4 * np.sqrt(expected * (1 - expected) / len(drawn))).all()


def test_row_i_of_step_t_is_a_function_of_seed_t_and_i_alone(folder: Path) -> None:
    task, other = mixture(folder), mixture(folder)
    for step in range(5):
        other.rows(9, step, 7)  # whatever was asked before
    whole = task.rows(1, 5, 64)
    for part in (slice(0, 1), slice(17, 40), slice(63, 64), slice(3, 3)):
        found = other.rows(1, 5, 64, part)
        assert np.array_equal(found.inputs, whole.inputs[part]) and np.array_equal(found.targets, whole.targets[part])
        assert found.global_count == 64 * 16
    assert np.array_equal(other.rows(1, 5, 8).inputs, whole.inputs[:8])
    assert len({task.source_of(seed, step, 64).tobytes() for seed in range(3) for step in range(3)}) == 9


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_together_see_the_batch_of_one(world_size: int, accumulation: int, folder: Path) -> None:
    config = run_of(folder, world_size, accumulation)
    feeders = [LocalFeeder(config, rank, world_size) for rank in range(world_size)]
    parts = [feeder.get(4, micro) for feeder in feeders for micro in range(accumulation)]
    alone = LocalFeeder(run_of(folder), 0, 1)
    assert_equal(concatenate(parts), alone.get(4, 0))


def run_of(folder: Path, world_size: int = 1, accumulation: int = 1) -> Config:
    data = DataConfig(
        name="mixture",
        sources=sources_of(folder),
        context=16,
        cache_dir=str(folder / "cache"),
        global_batch_size=16,
        validation_examples=24,
    )
    return changed(Config(data=data), optim__accumulation=accumulation, cluster__num_workers=world_size)


def test_validation_is_fixed_and_has_shares_by_weight(folder: Path) -> None:
    task = mixture(folder)
    whole = task.validation_rows(0, 24)
    assert letters(whole.inputs) == "A" * 15 + "B" * 6 + "C" * 3
    pieces = [task.validation_rows(start, 5) for start in range(0, 20, 5)] + [task.validation_rows(20, 4)]
    assert sum(piece.global_count for piece in pieces) == whole.global_count == 24 * 16
    together = concatenate(pieces)
    assert np.array_equal(together.inputs, whole.inputs) and np.array_equal(together.targets, whole.targets)


@pytest.mark.parametrize(
    ("shares", "number", "counts"),
    [([0.5, 0.5], 3, [2, 1]), ([0.99, 0.01], 10, [10, 0]), ([1 / 3] * 3, 256, [86, 85, 85]), ([1.0], 1, [1])],
)
def test_examples_are_allotted_by_largest_remainder(shares: list[float], number: int, counts: list[int]) -> None:
    assert allotted(np.array(shares), number) == counts


def test_a_source_of_weight_0_is_not_opened(folder: Path) -> None:
    sources = sources_of(folder) | {"d": {"name": "text", "files": ["/nowhere"], "weight": 0}}
    task = mixture(folder, sources)
    assert task.fingerprint() == mixture(folder).fingerprint()


def test_the_fingerprint_holds_every_source(folder: Path) -> None:
    fingerprint = mixture(folder).fingerprint()
    assert json.loads(json.dumps(fingerprint)) == fingerprint
    assert fingerprint["name"] == "mixture" and list(fingerprint["sources"]) == ["a", "b", "c"]
    assert [source["share"] for source in fingerprint["sources"].values()] == [0.625, 0.25, 0.125]
    assert len({source["train"]["sha256"] for source in fingerprint["sources"].values()}) == 3


def test_a_file_of_ones_own_and_a_key_on_the_line_make_a_mixture(folder: Path) -> None:
    (folder / "own" / "data").mkdir(parents=True)
    (folder / "own" / "data" / "both.yaml").write_text(
        f"name: mixture\nsources:\n  a: {{name: text, files: ['{folder}/a.txt'], weight: 1}}\n"
        "  code: {name: stdlib, weight: 1}\n"
    )
    config = compose(["data=both", "data.sources.code.weight=3"], str(folder / "own"))
    assert {source: share for source, (share, _) in config.data.parts().items()} == {"a": 0.25, "code": 0.75}


A = "{name: stdlib, weight: 1}"


@pytest.mark.parametrize(
    ("sources", "told"),
    [
        ("{}", r"data\.sources is empty; a mixture has some"),
        ("{a: {name: stdlib, weight: -1}}", r"data\.sources\.a\.weight=-1: needed is a number, 0 or more"),
        ("{a: {name: stdlib, weight: nan}}", r"data\.sources\.a\.weight.*(nan|NaN|finite)"),
        ("{a: {name: stdlib, weight: much}}", r"data\.sources\.a\.weight=much: needed is a number"),
        ("{a: {name: stdlib}}", r"data\.sources\.a\.weight=None: needed is a number"),
        ("{a: {name: stdlib, weight: 1e308}, b: {name: stdlib, weight: 1e308}}", r"the weights of a, b sum up to infinity"),
        ("{a: {name: stdlib, weight: 0}, b: {name: stdlib, weight: 0}}", r"the weights of a, b are all 0"),
        (
            f"{{a: {A}, b: {{name: stdlib, weight: 1, wieght: 2}}}}",
            r"data\.sources\.b: there is no key wieght; a source has name",
        ),
        (f"{{a: {A}, b: {{name: stdlib, weight: 1, context: 2}}}}", r"data\.sources\.b: there is no key context"),
        ("{a: {name: parity, weight: 1}}", r"data\.sources\.a\.name=parity: needed is one of hub, stdlib, text"),
        ("{a: {name: mixture, weight: 1}}", r"data\.sources\.a\.name=mixture: needed is one of hub, stdlib, text"),
        ("{a: {weight: 1}}", r"data\.sources\.a\.name=None: needed is one of"),
        ("{a: stdlib}", r"data\.sources\.a=stdlib: needed is a mapping"),
        ("{a: {name: text, weight: 1}}", r"data\.sources\.a: data\.files is empty"),
        ("{a: {name: text, files: b.txt, weight: 1}}", r"data\.sources\.a\.files=b\.txt: needed is a list of texts"),
        ("{a: {name: hub, weight: 1}}", r"data\.sources\.a: data\.path is empty"),
        ("{a: {name: stdlib, weight: 1, validation_fraction: 2}}", r"data\.sources\.a: data\.validation_fraction=2 is outside"),
    ],
)
def test_what_is_no_mixture_is_refused_in_one_line(sources: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--dry-run", "data=mixture", f"data.sources={sources}"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and re.search(told, err), err


def test_sources_without_a_mixture_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--dry-run", f"data.sources={{a: {A}}}"]) == 2
    assert "data.sources are of a mixture; use data=mixture" in capsys.readouterr().err
