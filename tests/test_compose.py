"""distcond.compose: what is composed, what is refused in which words; nothing is lost on the way to a file and back."""

import functools
import json
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from distcond.compose import compose, from_dict, hydra_main, load_config, nearest, override, save_config, to_dict
from distcond.config import CellName, Config, DataName, HaltingKind, ModelName
from distcond.errors import ConfigError

RUN = ["model=rnn", "data=parity", "model.tree.depth=6", "model.halting.kind=act", "optim.lr=1e-4", "seed=7"]


composed = functools.cache(lambda *words: compose(words))
"What the words compose to; not to be changed."


def write(folder: Path, **files: str) -> str:
    """A folder of configuration files: write(tmp_path, data__mine="name: text") is data/mine.yaml."""
    for name, text in files.items():
        file = folder / f"{name.replace('__', '/')}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return str(folder)


def refusal(*overrides: str, config_dir: str | None = None) -> str:
    with pytest.raises(ConfigError) as refused:
        compose(overrides, config_dir)
    message = str(refused.value)
    assert message and "\n" not in message
    return message


def test_groups_then_overrides_are_laid_over_the_dataclass() -> None:
    config = composed(*RUN)
    assert isinstance(config, Config)
    assert (config.model.name, config.data.name) == (ModelName.rnn, DataName.parity)
    assert (config.model.tree.depth, config.model.halting.kind) == (6, HaltingKind.act)
    assert (config.optim.lr, config.seed) == (1e-4, 7)
    assert config.model.cell is CellName.tanh and config.optim.betas == [0.9, 0.999]
    assert type(config.optim.betas) is list and type(config.sweep.space) is dict


def test_free_mappings_take_any_key_without_a_plus() -> None:
    config = compose(["optim.deepspeed.comms_logger.enabled=true", "optim.deepspeed={dump_state: false}"])
    assert config.optim.deepspeed == {"comms_logger": {"enabled": True}, "dump_state": False}


def test_sweep_space_is_by_dotted_keys_however_it_was_written() -> None:
    nested = ["sweep.space.model.tree.depth=[2,4]", "sweep.space.optim.lr={min:1e-4,max:1e-2,scale:log}"]
    dotted = ["sweep.space={model.tree.depth:[2,4],optim.lr:{min:1e-4,max:1e-2,scale:log}}"]
    space = {"model.tree.depth": [2, 4], "optim.lr": {"min": 1e-4, "max": 1e-2, "scale": "log"}}
    assert compose(nested).sweep.space == compose(dotted).sweep.space == space


def test_interpolations_are_resolved() -> None:
    assert compose(["run.name=d${model.tree.depth}", "model.tree.depth=5"]).run.name == "d5"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("model.tree.dpth=3", "there is no key model.tree.dpth; did you mean model.tree.depth?"),
        ("+model.tree.dpth=3", "there is no key model.tree.dpth; did you mean model.tree.depth?"),
        ("model.tree={dpth:3}", "there is no key model.tree.dpth; did you mean model.tree.depth?"),
        ("tree.depth=3", "there is no key tree.depth; did you mean model.tree.depth?"),
        ("lr=1e-3", "there is no key lr; did you mean optim.lr?"),
        ("max_steps=9", "there is no key max_steps; did you mean model.halting.max_steps or train.max_steps?"),
        ("modle=rnn", "there is no key modle; did you mean model?"),
        ("experimnt=dense", "there is no key experimnt; did you mean experiment?"),
        ("zzz=1", "there is no key zzz; `distcond train --cfg job` shows them all."),
        ("~zzz", "there is no key zzz; `distcond train --cfg job` shows them all."),
        ("model.tree.depth=deep", "model.tree.depth=deep: needed is a whole number."),
        ("model.tree.depth=1.5", "model.tree.depth=1.5: needed is a whole number."),
        ("model.tree.depth=", "model.tree.depth=: needed is a whole number."),
        ("model.tree.full_depth=all", "model.tree.full_depth=all: needed is a whole number or null."),
        ("optim.lr=fast", "optim.lr=fast: needed is a number."),
        ("optim.betas=[a,b]", "optim.betas=[a,b]: needed is a list [...], each entry a number."),
        ("data.files=x", "data.files=x: needed is a list [...], each entry text."),
        ("data.files=[[x]]", "data.files=[['x']]: needed is a list [...], each entry text."),
        ("train.profile=maybe", "train.profile=maybe: needed is true or false."),
        ("optim.deepspeed=3", "optim.deepspeed=3: needed is a mapping, e.g. {a: 1}."),
        ("run.name=null", "run.name=null: needed is text."),
        ("model.halting.kind=atc", "model.halting.kind=atc: needed is one of none, fixed, act, ponder."),
        ("train=3", "train=3: needed is a value for one of its keys: max_steps, log_every"),
        ("model.tree.depth=63", "model.tree.depth=63 is outside 0..62"),
        ("model.tree={depth:61,num_trees:3}", "have more than 2**62 leaves; use a smaller depth."),
        ("model.tree={gate:sign,depth:6,num_trees:32}", "takes 192 bits (model.tree.num_trees x model.tree.depth) from"),
        ("model=trasformer", "no model/trasformer.yaml; model has mlp, rnn, transformer; did you mean transformer?"),
        ("model.tree.depth=1,2", "model.tree.depth=1,2: needed is one value"),
        ("model.tree.depth=range(1,3)", "a search over values is `distcond sweep`."),
        ("parity", "'parity' is not an override; write key=value"),
        ("data.cache_dir=~/x", "cannot be parsed; quote special text, for the shell too: \"data.cache_dir='~/x'\"."),
        ("data.files=[a", "'data.files=[a' cannot be parsed; close every bracket"),
        ("run.name=${nope}", "run.name; Interpolation key 'nope' not found"),
        ("~model.tree.depth", "does not support deletion"),
        ("+model=rnn", "Multiple values for model."),
        ("model=null", "Config group override must be a string or a list."),
        ("data=[null]", "data=[null]: these groups, or a file's defaults, cannot be composed"),
        ("hydra.run.dir=x", "hydra.run.dir=x: Hydra's own settings have no effect on a run"),
    ],
)
def test_a_mistake_is_told_in_one_line(given: str, told: str) -> None:
    assert told in refusal(given)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("model.with", "model.width"),
        ("depht", "model.tree.depth"),
        ("optim.max_steps", "train.max_steps"),
        ("halting.kind", "model.halting.kind"),
    ],
)
def test_nearest_names_the_real_key(given: str, meant: str) -> None:
    real = ["model", "model.width", "model.tree", "model.tree.depth", "model.halting.kind", "train.max_steps"]
    assert nearest(given, real) == f"; did you mean {meant}?"


def test_own_files_are_found_beside_the_shipped_ones(tmp_path: Path) -> None:
    own = write(
        tmp_path / "it's mine, [really]",  # a path that Hydra's grammar would stumble over
        data__mine="name: text\nfiles: [a.txt]\ncontext: 64\n",
        experiment__deep="# @package _global_\ndefaults:\n  - override /data: mine\nmodel: {tree: {depth: 9}}\n",
    )
    assert compose(["data=mine"], own).data.files == ["a.txt"]
    config = compose(["experiment=deep", "data.context=32"], own)
    assert (config.model.tree.depth, config.data.name, config.data.context) == (9, DataName.text, 32)


@pytest.mark.parametrize(
    ("group", "text", "told"),
    [
        ("model", "tree: {dpth: 3}", "model/bad.yaml: there is no key model.tree.dpth; did you mean model.tree.depth?"),
        ("model", "tree: {depth: deep}", "model/bad.yaml: model.tree.depth=deep: needed is a whole number."),
        ("model", "tree: {\n", "bad.yaml, line 2: expected the node content"),
        ("model", "width: 1\nwidth: 2\n", "bad.yaml, line 2: found duplicate key width."),
        ("model", "- 1\n", "model/bad.yaml: Merge error: list is not a subclass of ModelConfig."),
        ("experiment", "seed: 3\n", "experiment/bad.yaml: the first line of an experiment is '# @package _global_'."),
        (
            "experiment",
            "# @package _global_\nmodle: {width: 1}",
            "experiment/bad.yaml: there is no key modle; did you mean",
        ),
        (
            "experiment",
            "# @package _global_\ndefaults:\n  - override /modle: rnn\n",
            "experiment/bad.yaml: there is no key modle; did you mean model?",
        ),
        (
            "experiment",
            "# @package _global_\ndefaults:\n  - override /model: rn\n",
            "model=rn: there is no model/rn.yaml; model has mlp, rnn, transformer; did you mean rnn?",
        ),
        ("experiment", "# @package _global_\ndefaults: [nope]\n", "there is no experiment/nope.yaml"),
    ],
)
def test_a_mistake_in_an_own_file_names_the_file(tmp_path: Path, group: str, text: str, told: str) -> None:
    assert told in refusal(f"{group}=bad", config_dir=write(tmp_path, **{f"{group}__bad": text}))


def test_own_files_do_not_hide_behind_shipped_names(tmp_path: Path) -> None:
    assert "has the name of a file that ships with distcond" in refusal(config_dir=write(tmp_path, data__text="context: 3"))


def test_a_missing_folder_is_told() -> None:
    assert refusal(config_dir="no/such") == "--config-dir no/such: no such folder."


@pytest.mark.parametrize("overrides", [[], RUN, ["sweep=depth_x_penalty", "optim.deepspeed.a.b=[1,{c:null}]"]])
def test_saved_loaded_and_shipped_configurations_are_equal(tmp_path: Path, overrides: list[str]) -> None:
    config = composed(*overrides)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert type(to_dict(config)["model"]["name"]) is str  # not the enum, which other processes need not have


def test_text_that_yaml_would_take_for_something_else_survives(tmp_path: Path) -> None:
    texts = ["1e-3", "on", "null", "~", "04:00:00", "a: b", "é\n x", "'", '"', "# c", "0x10", "2020-01-01"]
    free = {f"text_{number}": text for number, text in enumerate(texts)}
    config = override(Config(), {"data.files": texts, "optim.deepspeed": free, "tracking.group": "null"})
    save_config(config, tmp_path / "config.yaml")
    loaded = load_config(tmp_path / "config.yaml")
    assert loaded.data.files == texts and loaded.tracking.group == "null"
    assert loaded.optim.deepspeed == free


def test_a_saved_file_is_plain_yaml_that_any_reader_understands(tmp_path: Path) -> None:
    config = composed(*RUN)
    save_config(config, tmp_path / "config.yaml")
    loaded = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert loaded["model"]["halting"]["kind"] == "act" and loaded["optim"]["lr"] == 1e-4
    assert list(loaded) == [
        "seed",
        "run",
        "model",
        "data",
        "optim",
        "train",
        "checkpoint",
        "cluster",
        "sweep",
        "tracking",
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "config.yaml: no such file or directory."),
        ("- 1\n", "is not a configuration"),
        ("a: [\n", "config.yaml, line 2: "),
        ("model: {tree: {dpth: 1}}\n", "config.yaml: there is no key model.tree.dpth; did you mean model.tree.depth?"),
        ("seed: x\n", "config.yaml: seed=x: needed is a whole number."),
        ("seed: -1\n", "seed=-1 is negative"),
    ],
)
def test_a_file_that_cannot_be_run_is_refused(tmp_path: Path, text: str | None, told: str) -> None:
    file = tmp_path / "config.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_config(file)
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_override_is_typed_and_leaves_the_original_alone() -> None:
    config = Config()
    changed = override(config, {"model.tree.depth": 4, "model.halting.kind": "fixed", "optim.lr": 1})
    assert (changed.model.tree.depth, changed.model.halting.kind) == (4, HaltingKind.fixed)
    assert type(changed.optim.lr) is float
    assert config == Config() != changed


def test_override_judges_the_values_together() -> None:
    config = override(Config(), {"cluster.num_workers": 3, "data.global_batch_size": 33})  # 3 alone does not divide
    assert (config.cluster.num_workers, config.data.global_batch_size) == (3, 33)
    with pytest.raises(ConfigError, match=r"takes 9 bits .* which has 8 \(model\.width=8\)"):
        override(Config(), {"model.tree.gate": "sign", "model.tree.depth": 9, "model.width": 8})


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("model.tree.dpth", 4, "there is no key model.tree.dpth; did you mean model.tree.depth?"),
        ("model.tree.depth", "deep", "model.tree.depth=deep: needed is a whole number."),
        ("model.tree.depth", -1, "model.tree.depth=-1 is outside 0..62"),
        ("model.tree.num_trees", 3, "model.tree.num_trees=3 does not divide the 512 outputs of the tree layer up; use 2 or 4."),
        ("model.tree.num_trees", 0, "model.tree.num_trees=0 is below 1; use 1 or more."),
        ("model.tree.min_visits", 0, "model.tree.min_visits=0 is below 1; use 1 or more."),
        ("model.tree.max_nodes", 0, "model.tree.max_nodes=0 is below 1; the root of a tree always exists"),
        ("cluster.rebalance_every", 0, "cluster.rebalance_every=0 is below 1; use 1 or more, or null for never."),
        ("model.tree", 4, "model.tree=4: needed is a value for one of its keys"),
    ],
)
def test_override_refuses_what_the_command_line_would(key: str, value: object, told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        override(Config(), {key: value})
    assert told in str(refused.value)


def test_hydra_shows_the_configuration_that_would_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert hydra_main(["--cfg", "job", *RUN]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == to_dict(composed(*RUN))
    assert hydra_main(["--cfg", "job", "--package", "no.such"]) == 1
    assert not list(tmp_path.iterdir())
