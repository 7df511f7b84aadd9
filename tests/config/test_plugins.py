"""Tasks and models of other packages, which are put into sys.path here; tests/test_packaging.py installs one."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from distcond.compose import compose, load_config, save_config
from distcond.config import ModelConfig, plugins
from distcond.data.tasks import build_task, shape_of
from distcond.errors import ConfigError, RunError
from distcond.train.checkpoint import DENSE
from distcond.train.fits import check_fits, cost_of
from distcond.train.grow import check_suits, start_from
from distcond.train.learner import cost_for, learner_for
from distcond.train.plan import describe

ROOT = Path(__file__).parents[2]
EXAMPLE = (ROOT / "conf" / "mine.py").read_text()
MINE = ["data.name=majority", "data.options.bits=9", "model=mlp", "model.name=residual", "model.width=8", "model.tree.depth=3"]
Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a package of one file with entry points into sys.path."""

    def put(code: str, tasks: str = "", models: str = "", package: str = "mine") -> Path:
        folder = tmp_path / package
        info = folder / f"{package}-1.0.dist-info"
        info.mkdir(parents=True)
        (folder / f"{package}.py").write_text(code)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[distcond.tasks]\n{tasks}\n[distcond.models]\n{models}\n")
        monkeypatch.syspath_prepend(folder)
        plugins._installed.cache_clear()
        return folder

    yield put
    for name in ("mine", "other"):
        sys.modules.pop(name, None)
    plugins._installed.cache_clear()


@pytest.fixture
def example(install: Install) -> Path:
    return install(EXAMPLE, "majority = mine:Majority", "residual = mine:Residual")


def test_a_name_of_an_entry_point_is_known_but_not_imported(example: Path, tmp_path: Path) -> None:
    config = compose(MINE)
    assert (config.data.name, config.data.options, config.model.name) == ("majority", {"bits": 9}, "residual")
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert "mine" not in sys.modules
    shape_of(config.data)
    assert "mine" in sys.modules


def test_layers_that_are_trees_are_chosen_by_the_model_itself(example: Path) -> None:
    with pytest.raises(ConfigError, match=r"for models that ship with distcond; model.name=residual chooses its own trees"):
        compose([*MINE, "model.tree.layers=[linear]"])


def test_a_model_of_another_package_grows(example: Path, tmp_path: Path) -> None:
    dense, config = compose([*MINE, "model.tree.depth=0"]), compose([*MINE, "train.init_from=/runs/dense"])
    old, new = (learner_for(each, shape_of(each.data)).eval() for each in (dense, config))
    weights = {f"{name}/weight": parameter.detach() for name, parameter in old.named_parameters()}
    save_file(weights | {f"buffers/{name}": buffer for name, buffer in old.named_buffers()}, tmp_path / DENSE)
    check_suits(dense, config, tmp_path)
    start_from(new, tmp_path)
    x, lengths = torch.randint(2, (4, 1, 9)).float(), torch.ones(4, dtype=torch.int64)
    torch.testing.assert_close(new.body(x, lengths)[0], old.body(x, lengths)[0])
    save_file({"body.lost/weight": torch.zeros(2), **weights}, tmp_path / DENSE)
    with pytest.raises(RunError, match=r"holds shape \[2\] for body.lost, the new model needs nothing"):
        check_suits(dense, config, tmp_path)


@pytest.mark.thorough
def test_what_is_installed_but_unused_is_never_looked_up(install: Install) -> None:
    folder = install("raise SystemExit('imported')", "broken = mine:nothing", "broken = mine:nothing")
    code = """
import importlib.metadata, sys
def looked(**options): raise SystemExit("looked up")
importlib.metadata.entry_points = looked
from distcond.compose import compose
from distcond.train.fits import check_fits, cost_of
from distcond.data.tasks import build_task
config = compose(["data=parity", "model=rnn"])
check_fits(config), build_task(config.data)
assert "mine" not in sys.modules and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"], check=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.name=majorty", r"data.name=majorty: needed is one of stdlib, .*sort, or an entry point of distcond.tasks, of "
         r"which majority is installed; did you mean majority\?"),
        ("data.name=party", r"did you mean parity\?"),
        ("model.name=residuals", r"of distcond.models, of which residual is installed; did you mean residual\?"),
        ("data.options.bits=3", r"data.options=\{'bits': 3\} is read by entry points alone; data.name=stdlib has keys of"),
        ("model.options.a=3", r"model.options=\{'a': 3\} is read by entry points alone; model.name=transformer has keys"),
        ("data.options.api_key=abc", "data.options.api_key holds a password, key or token"),
    ],
)  # fmt: skip
def test_a_name_that_is_nowhere_and_options_of_what_ships_are_refused(example: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        compose([override])
    assert "\n" not in str(error.value)


def test_two_packages_with_one_name_are_refused(example: Path, install: Install) -> None:
    install("", "majority = other:Majority", package="other")
    with pytest.raises(ConfigError, match=r"data.name=majority is in the packages (mine and other|other and mine); remove all"):
        compose(MINE)


BROKEN_TASKS = {
    "import nothing_of_this_name": "mine:make, an entry point of distcond.tasks, failed with ModuleNotFoundError: No module",
    "x = 1": "failed with AttributeError: module 'mine' has no attribute 'make'",
    "def make(config): return config.nothing": r"failed with AttributeError: .*mine.py, line 1\)",
    "def make(config): return 3": "returned int: AttributeError: 'int' object has no attribute 'kind'",
}
CHANGES = {
    "kind = 'text'": "its kind is 'text'; needed is bytes or vectors",
    "kind = 'bytes'": "is no task of bytes or tokens, whose three sizes are one",
    "max_length = 0": "has a size below 1",
    "num_classes = 2": "num_classes=2 does not divide output_size=1",
    "max_length = 2": r"one row has inputs float32\[1, 1, 9\]; needed is float32\[1, 2, 9\]",
    "rows = None": "TypeError: 'NoneType' object is not callable",
}


@pytest.mark.parametrize(("code", "message"), BROKEN_TASKS.items())
def test_a_task_that_cannot_be_had_is_one_line(install: Install, code: str, message: str) -> None:
    install(code, "made = mine:make")
    with pytest.raises(ConfigError, match=message) as error:
        build_task(compose(["data.name=made", "model=rnn"]).data)
    assert "\n" not in str(error.value) and str(error.value).startswith("data.name=made: mine:make")


@pytest.mark.parametrize(("change", "message"), CHANGES.items())
def test_a_task_of_the_wrong_kind_is_one_line(install: Install, change: str, message: str) -> None:
    install(f"{EXAMPLE}\nclass Changed(Majority):\n    {change}\n", "made = mine:Changed")
    with pytest.raises(ConfigError, match=f"mine:Changed, an entry point of distcond.tasks, returned Changed: .*{message}"):
        build_task(compose(["data.name=made", "data.options.bits=9", "model=rnn"]).data)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("make = lambda config, task: 3", "returned int; needed is a torch.nn.Module"),
        ("make = lambda config, task: torch.nn.Linear(9, 1)", "returned a Linear, which fails with TypeError"),
        (
            "class make(Residual):\n    def forward(self, i, n): return i",
            r"returned a make, which gives Tensor; needed is a tuple \(logits, PonderSt",
        ),
        (
            "class make(Residual):\n    def forward(self, i, n): return i, super().forward(i, n)[1]",
            r"returned a make, which gives logits \[1, 1, 9\] for inputs \[1, 1, 9\]; needed is \[1, 1, 1\]",
        ),
        ("def make(config, task): raise ValueError('no luck')", r"failed with ValueError: no luck \(.*mine.py, line \d+\)"),
    ],
)
def test_a_model_that_cannot_be_had_is_one_line(install: Install, code: str, message: str) -> None:
    install(f"{EXAMPLE}\n{code}", "majority = mine:Majority", "made = mine:make")
    config = compose([*MINE, "model.name=made"])
    with pytest.raises(ConfigError, match=f"model.name=made: mine:make, an entry point of distcond.models, {message}") as error:
        check_fits(config)
    assert "\n" not in str(error.value)


def test_the_transformer_is_refused_for_a_task_of_vectors(example: Path) -> None:
    with pytest.raises(ConfigError, match="model=transformer reads bytes, but data=majority gives vectors"):
        check_fits(compose(["data.name=majority", "data.options.bits=9"]))


def test_a_dry_run_counts_what_a_model_of_another_package_has(example: Path) -> None:
    config = compose([*MINE, "model.halting.kind=act", "model.tree.max_nodes=7"])
    cost = cost_of(config)
    # read and head, K gates, the halting unit; seven nodes of 8 x 9 and a bias; a path of 4 matrices and the gates.
    assert cost.dense_parameters == (9 * 8 + 8) + (8 + 1) + 3 * 9 + (8 + 1)
    assert (cost.node_parameters, cost.macs_per_position) == (7 * (8 * 9 + 8), 9 * 8 + 8)
    assert cost.macs_per_step == 4 * 8 * 9 + 3 * 9
    assert "subtrees of the model's own trees over 2 ranks" in describe(config)


def test_a_model_built_like_a_shipped_one_costs_the_same(example: Path) -> None:
    own = compose([*MINE, "model.options={}", "model.halting.kind=none"])
    learner = learner_for(compose(["model=mlp", "data=parity", "model.width=8", "model.tree.depth=3"]), shape_of(own.data))
    shipped = cost_for(ModelConfig(name="mlp", width=8, tree=own.model.tree), shape_of(own.data), learner.body)
    assert cost_for(own.model, shape_of(own.data), learner.body) == shipped
