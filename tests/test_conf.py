"""conf/: every file composes, says something, and says it once."""

import functools
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from distcond.compose import compose, compose_node, override, to_dict
from distcond.config import Config
from distcond.data.tasks import build_task, shape_of

CONF = Path(__file__).parents[1] / "conf"
FILES = sorted(file.relative_to(CONF).as_posix().removesuffix(".yaml") for file in CONF.glob("*/*.yaml"))
NEEDED = {  # what an option asks of the user, or of the model beside it
    "data/text": ["data.files=[corpus.txt]"],
    "data/mixture": ["data.sources={a: {name: stdlib, weight: 1}}"],
    "data/hub": ["data.path=roneneldan/TinyStories"],
    "data/parity": ["model=rnn"],
    "data/logic": ["model=rnn"],
    "data/addition": ["model=rnn"],
    "data/sort": ["model=rnn"],
}


@functools.cache
def composed(*words: str) -> Config:
    """What the words compose to; not to be changed."""
    return compose(list(words))


def values_of(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8")) or {}


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def without(name: str) -> dict[str, Any]:
    """Dotted key -> value of the configuration as it would be if the file set nothing."""
    if not name.startswith("experiment/"):
        return dict(leaves(to_dict(Config())))
    chosen = [entry for entry in values_of(name).get("defaults", []) if isinstance(entry, dict)]
    choices = [f"{key.removeprefix('override /')}={option}" for entry in chosen for key, option in entry.items()]
    return dict(leaves(to_dict(composed(*choices))))


def test_there_are_files() -> None:
    assert {"model/transformer", "data/stdlib", "cluster/local", "sweep/depth_x_penalty", "experiment/dense"} <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_every_file_composes(name: str) -> None:
    composed(name.replace("/", "="), *NEEDED.get(name, []))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.thorough
def test_no_value_repeats_what_holds_without_it(name: str) -> None:
    values = {key: value for key, value in values_of(name).items() if key != "defaults"}
    prefix = "" if name.startswith("experiment/") else f"{name.partition('/')[0]}."
    before = without(name)
    repeated = [key for key, value in leaves(values, prefix) if before.get(key, "not there") == value]
    assert not repeated


def test_config_yaml_chooses_options_and_sets_no_key() -> None:
    values = values_of("config")
    assert set(values) == {"defaults", "hydra"}
    assert "_self_" in values["defaults"] and values["defaults"][0] == "schema"


@pytest.mark.parametrize("name", ["config", *FILES])
def test_files_hold_no_code(name: str) -> None:
    assert "_target_" not in (CONF / f"{name}.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FILES)
def test_the_readme_names_every_option(name: str) -> None:
    group, option = name.split("/")
    rows = [line for line in (CONF / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{group}`")]
    assert len(rows) == 1 and f"`{option}`" in rows[0]


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("sweep/")])
def test_every_trial_of_a_grid_is_a_valid_run(name: str) -> None:
    config = composed(name.replace("/", "="))
    grid = {key: values for key, values in config.sweep.space.items() if isinstance(values, list)}
    for point in itertools.product(*grid.values()):
        override(config, dict(zip(grid, point, strict=True)))


@pytest.mark.parametrize("depth", [0, 1, 12])
def test_the_default_model_takes_any_depth(depth: int) -> None:
    assert override(composed(), {"model.tree.depth": depth}).model.tree.depth == depth


def test_the_control_has_neither_tree_nor_halting() -> None:
    model = compose_node(["experiment=dense"]).model
    assert (model.tree.depth, model.halting.kind) == (0, "none")


GRAVES = {  # name -> inputs, outputs, width, batch, most steps: the sizes of the paper's five tasks
    "parity": (64, 1, 128, 128, 100),
    "logic": (102, 1, 128, 16, 100),
    "addition": (50, 66, 512, 32, 20),
    "sort": (2, 15, 512, 16, 100),
    "text": (256, 256, 1500, 16, 100),
}


@pytest.mark.parametrize(
    "control", [{}, {"model.halting.kind": "none"}, {"model.halting.kind": "fixed", "model.halting.max_steps": 3}]
)
@pytest.mark.parametrize("name", GRAVES)
def test_graves_experiments_have_his_sizes_and_their_controls(name: str, control: dict[str, Any]) -> None:
    config = override(composed(f"experiment=graves_{name}"), control)
    inputs, outputs, width, batch, steps = GRAVES[name]
    task = shape_of(config.data)
    assert (task.input_size, task.output_size, config.model.width, config.data.global_batch_size) == (
        inputs,
        outputs,
        width,
        batch,
    )
    assert config.model.cell == ("tanh" if name == "parity" else "lstm") and config.model.tree.depth == 0
    assert control or (config.model.halting.kind, config.model.halting.max_steps) == ("act", steps)


@pytest.mark.parametrize("kind", ["act", "ponder", "fixed"])
def test_extrapolation_is_judged_on_more_bits_than_are_trained(kind: str) -> None:
    penalty = {} if kind == "act" else {"model.halting.time_penalty": None}
    config = override(composed("experiment=parity_extrapolation"), {"model.halting.kind": kind, **penalty})
    task = build_task(config.data)
    trained, judged = (batch.inputs.sum(axis=2) for batch in (task.rows(0, 0, 500), task.validation_rows(0, 500)))
    assert (trained.min(), trained.max(), judged.min(), judged.max()) == (1, 32, 33, 48)
    assert task.input_size == 96
