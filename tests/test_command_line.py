"""A configuration as a command line: composing the line gives the configuration back; a fork has the settings of its run."""

import random
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from distcond.command_line import overrides_of, train_line, typed
from distcond.compose import compose, save_config
from distcond.config import Config, DataConfig, DataName
from distcond.config.readers import READERS
from distcond.errors import ConfigError, RunError
from tests.helpers import changed, small_config

TEXTS = [
    *("plain", "", "a b", "it's", '"quoted"', "a,b", "[x]", "{y}", "a=b", "null", "true", "1e3", "42", "~/x", "a:b", "ü"),
    *("a\\b", "a\\'b", "a\\\\'b", "end\\", "end\\\\", "\\'"),
]

PLACES = ("tracking__project", "tracking__group", "data__path", "data__subset", "data__column", "cluster__partition")
"Keys that take any text."


def test_nothing_differs_from_what_is_composed_without_a_word() -> None:
    assert overrides_of(compose([])) == []


def test_what_was_typed_comes_back() -> None:
    words = ["model=rnn", "data=parity", "optim=adam", "optim.lr=0.0003", "model.halting.kind=act", "run.name=a"]
    config = compose(words)
    assert compose(overrides_of(config)) == config
    assert train_line(config, {"train.max_steps": 7}).endswith("train.max_steps=7")


@pytest.mark.parametrize("first", range(0, len(TEXTS), len(PLACES)))
def test_any_text_comes_back(first: int) -> None:
    texts = dict(zip(PLACES, TEXTS[first:], strict=False))
    config = changed(compose([]), data__files=[*texts.values(), "b"], **texts)
    assert compose(overrides_of(config)) == config


def test_free_mappings_and_missing_values_come_back(tmp_path: Path) -> None:
    options: dict[str, Any] = {"zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 5}, "prescale_gradients": False}
    config = changed(small_config(tmp_path), optim__deepspeed=options, train__peak_tflops=None, cluster__shard_level=3)
    assert compose(overrides_of(config)) == config


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.thorough
def test_random_changes_come_back(seed: int) -> None:
    generator = random.Random(seed)
    choices: dict[str, list[Any]] = {
        "model__width": [8, 64], "model__tree__depth": [0, 9], "optim__lr": [1e-7, 0.1234567], "optim__betas": [[0.5, 0.75]],
        "data__cache_dir": TEXTS,
        "train__peak_tflops": [None, 3.5], "train__profile": [True], "cluster__rebalance_every": [None, 4],
    }  # fmt: skip
    config: Config = changed(compose([]), **{key: generator.choice(values) for key, values in choices.items()})
    assert compose(overrides_of(config)) == config


def test_a_line_that_is_printed_of_a_run_can_be_typed_whatever_nothing_reads(tmp_path: Path) -> None:
    config = small_config(tmp_path, data__name="text", data__files=["a.txt"], data__num_bits=8, model__name="rnn", model__heads=2)
    assert typed(overrides_of(config)) == config


# ---- lines that are typed ----------------------------------------------------------------------------------------------


PARENT = [
    *("data=text", "data.files=[/corpus/a.txt]", "data.context=64", "model.width=64", "model.heads=2", "optim.grad_clip=0.5"),
    *("optim.deepspeed.dump_state=true", "train.max_steps=70", "cluster.num_workers=1", "seed=5"),
]


@pytest.fixture
def parent(tmp_path: Path) -> Config:
    """What tmp_path/x was trained with."""
    config = compose([*PARENT, "run.name=x", f"run.dir={tmp_path}"])
    (tmp_path / "x").mkdir()
    save_config(config, tmp_path / "x" / "config.yaml")
    return config


def fork(parent: Config, *words: str, config_dir: Path | None = None) -> Config:
    """What a fork of it trains with, without the marks of one."""
    line = ["run.name=x", f"run.dir={parent.run.dir}", "run.fork=true", *words]
    config = typed(line, None if config_dir is None else str(config_dir), may_fork=True)
    assert config.run.fork
    return changed(config, run__fork=False)


def test_a_fork_keeps_the_settings_of_its_run_but_what_was_typed(parent: Config) -> None:
    assert fork(parent) == parent
    assert fork(parent, "optim.lr=1e-4") == changed(parent, optim__lr=1e-4)
    assert fork(parent, "data.files=[/b.txt]", "data.context=128") == changed(parent, data__files=["/b.txt"], data__context=128)
    assert fork(parent, "optim.grad_clip=1.0", "model.heads=4") == changed(parent, optim__grad_clip=1.0, model__heads=4)


def test_a_typed_group_wins_over_the_settings_of_the_run(parent: Config) -> None:
    assert fork(parent, "optim=adam", "optim.lr=0.1") == changed(parent, optim=compose(["optim=adam", "optim.lr=0.1"]).optim)
    other = fork(parent, "data=parity", "model=rnn", "data.num_bits=9")
    assert other == changed(
        parent, **{name: getattr(compose(["data=parity", "model=rnn", "data.num_bits=9"]), name) for name in ("data", "model")}
    )


def test_what_a_typed_experiment_says_wins_over_the_settings_of_the_run(parent: Config, tmp_path: Path) -> None:
    dense = fork(parent, "experiment=dense")
    assert dense == changed(parent, model__tree__depth=0, model__tree__full_depth=None, model__halting__kind="none")
    graves, alone = fork(parent, "experiment=graves_parity"), compose(["experiment=graves_parity"])
    assert (graves.model, graves.data, graves.train) == (alone.model, alone.data, alone.train)
    assert (graves.seed, graves.optim.grad_clip) == (5, 0.0)
    own = tmp_path / "own" / "experiment" / "on.yaml"  # which forks by itself
    own.parent.mkdir(parents=True)
    own.write_text(f"# @package _global_\nrun: {{fork: true, name: x, dir: {parent.run.dir}}}\noptim: {{lr: 0.1}}\n")
    config = typed(["experiment=on"], str(tmp_path / "own"), may_fork=True)
    assert config == changed(parent, run__fork=True, optim__lr=0.1)


def test_a_run_that_cannot_be_forked_is_told_in_one_line(parent: Config, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=f"run.fork=true: {tmp_path}/y holds no run to start from; check run.name and run.dir"):
        fork(parent, "run.name=y")
    (tmp_path / "x" / "config.yaml").write_text("seed: [")
    with pytest.raises(RunError, match=f"the settings of {tmp_path}/x, which are unreadable: .*config.yaml, line 1") as refused:
        fork(parent)
    assert "\n" not in str(refused.value)


def test_only_a_line_that_may_fork_looks_for_a_run(tmp_path: Path) -> None:
    assert typed(["run.name=y", "run.fork=true"]) == compose(["run.name=y", "run.fork=true"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            "data.files=[a.txt]",
            r"data.files=\['a.txt'\] is read by data=text, hub, mixture, not by data=stdlib; use data=text, or",
        ),
        ("++data.path=x", "data.path=x is read by data=hub, mixture, not by data=stdlib; use data=hub, or leave data.path out"),
        ("data=text data.files=[a] data.column=x", "data.column=x is read by data=hub, mixture, not by data=text"),
        (
            "data=parity model=rnn data.context=64",
            "data.context=64 is read by data=stdlib, text, hub, mixture, not by data=parity",
        ),
        ("data.num_bits=9", "data.num_bits=9 is read by data=parity, not by data=stdlib"),
        ("model.cell=gru", "model.cell=gru is read by model=rnn, not by model=transformer; use model=rnn, or leave"),
        ("model=rnn model.heads=2", "model.heads=2 is read by model=transformer, not by model=rnn"),
    ],
)
def test_a_key_that_nobody_reads_is_refused_where_it_is_typed(words: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        typed(words.split())
    compose(words.split())  # as files of earlier runs, trials of a sweep and settings of a forked run are


@pytest.mark.parametrize(
    "words",
    [
        "data.files=[] data.num_bits=64",
        "data=text data.files=[a] data.tokenizer=''",
        "data=mixture data.sources={a:{name:hub,path:x,weight:1}} data.files=[a] data.column=b",
        "data=sort model=rnn data.max_length=9 data.cache_dir=/x data.shard_mib=3",
        "experiment=parity_extrapolation data=logic",
        "model=rnn model.feed_forward=512",
    ],
)
def test_what_is_read_or_holds_anyway_is_let_through(words: str) -> None:
    assert typed(words.split()) == compose(words.split())


def test_who_reads_a_key_of_the_data_is_known() -> None:
    everybody = {"name", "options", "global_batch_size", "validation_examples", "cache_dir", "shard_mib"}
    others = {"sources"}  # judged wherever they are given
    assert {field.name for field in fields(DataConfig)} == READERS["data"].keys() | everybody | others
    assert all({*readers} <= {*DataName} for readers in READERS["data"].values())
