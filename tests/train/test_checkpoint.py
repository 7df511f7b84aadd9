"""Checkpoints: a resumed run is the uninterrupted one, on the same ranks to the last bit; a damaged one is never used."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from distcond.config import Config
from distcond.data.batch import Batch
from distcond.data.batches import LocalFeeder
from distcond.errors import RunError
from distcond.train.checkpoint import newest_checkpoint, read_state
from distcond.train.sealer import wait_for_orphans
from distcond.train.sealing import prune
from tests.helpers import asked_for, changed, folder_of, metric_rows, run_ranks, small_config, text_config, train_here, train_run
from tests.train.traces import rows_by_node


class CrashingFeeder(LocalFeeder):
    """Fails on every rank while the fourth step is being trained, as a lost machine would."""

    def get(self, step: int, micro: int) -> Batch:
        if step == 3:
            raise ConnectionError("the cable is out")
        return super().get(step, micro)


def train_and_crash(configs: list[tuple[Config, Config]]) -> list[str]:
    """Train the first of each pair to its end; what the other one failed with."""
    failures = []
    for straight, broken in configs:
        train_here(straight)
        with pytest.raises(ConnectionError) as error:
            train_here(broken, CrashingFeeder)
        failures.append(str(error.value))
    return failures


def train_all(configs: list[Config]) -> None:
    for config in configs:
        train_here(config)


def digests(checkpoint: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in checkpoint.iterdir()}


# ---- resume ------------------------------------------------------------------------------------------------------------

# Everything that has a state of its own: momenta, decay that rows catch up on, a schedule, clipping, gates' statistics,
# a budget of ponder steps.
OPTIONS = {
    "cluster__num_workers": 2,
    "train__max_steps": 4,
    "train__eval_every": 3,
    "optim__weight_decay": 0.1,
    "optim__schedule": "cosine",
    "optim__warmup_steps": 2,
    "optim__accumulation": 2,
    "model__halting__target_steps": 1.5,
}


def mixture_config(folder: Path, **changes: Any) -> Config:
    """`text_config` on two thirds of one of its files and one third of the others."""
    config = text_config(folder, **changes)
    sources = {
        "one": {"name": "text", "files": [f"{folder}/corpus/0.txt"], "weight": 2},
        "more": {"name": "text", "files": [f"{folder}/corpus/[1-7].txt"], "weight": 1},
    }
    return changed(config, data__name="mixture", data__files=[], data__sources=sources)


GROWS_AND_MOVES = {"model__tree__min_visits": 9, "model__tree__max_nodes": 9, "cluster__rebalance_every": 3}


RESUMED: dict[str, tuple[Callable[..., Config], dict[str, Any]]] = {
    "parity, ZeRO 0": (small_config, {"optim__zero_stage": 0}),
    "text, ZeRO 2, growing and moving": (text_config, {"optim__zero_stage": 2, **GROWS_AND_MOVES}),
    "mixture, ZeRO 0": (mixture_config, {"optim__zero_stage": 0}),
    "parity, ZeRO 3": (small_config, {"optim__zero_stage": 3}),
}


@pytest.fixture(scope="module")
def resumed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with an uninterrupted run and one that was resumed, by other processes than those it broke in."""
    folders = {name: tmp_path_factory.mktemp("resumed") for name in asked_for(request, "name")}
    pairs = [
        tuple(make(folders[name], run__name=run, **OPTIONS, **changes) for run in ("straight", "broken"))
        for name, (make, changes) in RESUMED.items()
        if name in folders
    ]
    assert run_ranks(train_and_crash, 2, pairs) == [["the cable is out"] * len(pairs)] * 2
    for folder in folders.values():
        wait_for_orphans(folder / "broken/checkpoints")
        assert (folder / "broken/checkpoints/latest").read_text() == "step_00000002\n"
    run_ranks(train_all, 2, [broken for _, broken in pairs])
    return folders


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_run_is_the_uninterrupted_one(resumed: dict[str, Path], name: str) -> None:
    straight, broken = resumed[name] / "straight", resumed[name] / "broken"
    for last in ("step_00000002", "step_00000004"):
        assert digests(broken / "checkpoints" / last) == digests(straight / "checkpoints" / last)
    rows = metric_rows(straight)
    assert metric_rows(broken) == rows  # the third step is there once
    penalties = [row["ponder/penalty"] for row in rows if "ponder/penalty" in row]
    assert len(set(penalties)) == 4 and min(penalties) > 0
    tables = load_file(straight / "checkpoints/step_00000004/tables_00000_of_00002.safetensors")
    owners = next(owner.tolist() for name, owner in tables.items() if name.endswith("/owner"))
    moved = owners != [subtree % 2 for subtree in range(len(owners))]
    assert moved == ("cluster__rebalance_every" in RESUMED[name][1])


def load_here(configs: list[Config]) -> list[tuple[dict[str, dict[int, Tensor]], dict[str, Tensor]]]:
    """What each run holds after it has read its checkpoint, before any step: rows, and the dense part of rank 0."""
    from distcond.train.state import start_run

    found = []
    for config in configs:
        feeder = LocalFeeder(config, dist.get_rank(), config.cluster.num_workers)
        run = start_run(config, folder_of(config), feeder, feeder.task)
        found.append((rows_by_node(run.learner), run.engine.dense_state()))
        run.writer.close()  # or the next run would wait for what writes for this one
    return found


def rows_in_files(checkpoint: Path) -> dict[str, dict[int, Tensor]]:
    """Rows and moments of all files together, by node, read by hand."""
    found: dict[str, dict[int, Tensor]] = {}
    for file in checkpoint.glob("tables_*"):
        tensors = load_file(file)
        for name, value in tensors.items():
            layer, _, part = name.rpartition("/")
            if f"{layer}/keys" in tensors and part != "keys":
                found.setdefault(name, {}).update(zip(tensors[f"{layer}/keys"].tolist(), value, strict=True))
    return found


PLACES = {
    "1 rank, ZeRO 3": {"cluster__num_workers": 1, "optim__zero_stage": 3},
    "2 ranks, ZeRO 0, other shards": {"cluster__num_workers": 2, "optim__zero_stage": 0, "cluster__shard_level": 1},
    "4 ranks, ZeRO 2, two copies": {"cluster__num_workers": 4, "optim__zero_stage": 2, "cluster__expert_parallel_size": 2},
    "4 ranks, ZeRO 1": {"cluster__num_workers": 4, "optim__zero_stage": 1},
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """An uninterrupted run of 5 steps of a forest on 2 ranks, with checkpoints of the last 4."""
    constant = {
        **OPTIONS,
        "model__tree__num_trees": 2,
        "optim__schedule": "constant",
        "train__max_steps": 5,
        "train__eval_every": 2,
        "checkpoint__every": 1,
        "checkpoint__keep_last": 4,
    }
    config = small_config(tmp_path_factory.mktemp("runs"), **constant)
    train_run(config)
    return config


def branch(config: Config, step: int, to: Path) -> Config:
    """A copy of a run that got no further than a step."""
    old, new = Path(config.run.dir) / config.run.name, to / config.run.name
    shutil.copytree(old, new)
    for late in (new / "checkpoints").glob("step_*"):
        if int(late.name[5:]) > step:
            shutil.rmtree(late)
    (new / "checkpoints/latest").write_text(f"step_{step:08d}\n")
    return changed(config, run__dir=str(to), train__max_steps=step)


@pytest.fixture(scope="module")
def moved(request: pytest.FixtureRequest, straight: Config, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What each rank of every place has read from the checkpoint of step 3."""
    config, found = branch(straight, 3, tmp_path_factory.mktemp("moved")), {}
    asked = asked_for(request, "place")
    for size in {PLACES[place]["cluster__num_workers"] for place in asked}:
        places = [place for place in asked if PLACES[place]["cluster__num_workers"] == size]
        ranks = run_ranks(load_here, size, [changed(config, **PLACES[place]) for place in places])
        found |= {place: list(held) for place, held in zip(places, zip(*ranks, strict=True), strict=True)}
    return found


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.thorough
def test_checkpoint_moves_between_ranks_stages_and_placements(straight: Config, moved: dict[str, list[Any]], place: str) -> None:
    checkpoint = Path(straight.run.dir) / "run/checkpoints/step_00000003"
    saved_rows, saved_dense = rows_in_files(checkpoint), load_file(checkpoint / "dense.safetensors")
    held: dict[str, dict[int, Tensor]] = {}
    for rows, dense in moved[place]:
        assert all(torch.equal(value, saved_dense[name]) for name, value in dense.items())
        for part, nodes in rows.items():
            for node, row in nodes.items():
                assert torch.equal(row, saved_rows[part][node]), f"{part} of node {node}"
            held.setdefault(part, {}).update(nodes)
    assert {part: nodes.keys() for part, nodes in held.items()} == {part: rows.keys() for part, rows in saved_rows.items()}


@pytest.mark.thorough
def test_run_goes_on_from_2_ranks_to_1_to_2_to_4_through_all_stages(straight: Config, tmp_path: Path) -> None:
    moved = branch(straight, 2, tmp_path)  # ZeRO 1
    for last, place in ((3, "1 rank, ZeRO 3"), (4, "2 ranks, ZeRO 0, other shards"), (5, "4 ranks, ZeRO 2, two copies")):
        train_run(changed(moved, train__max_steps=last, **PLACES[place]))
    expected, found = metric_rows(Path(straight.run.dir) / "run"), metric_rows(tmp_path / "run")
    validated = {row["step"] for row in expected if "val/nll" in row}
    found = [row for row in found if "val/nll" not in row or row["step"] in validated]  # each part ends with one, too
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for row, other in zip(found, expected, strict=True):
        for name in row.keys() & {"train/loss", "val/nll", "ponder/cost", "optim/grad_norm"}:
            # Adam makes much of a gradient that is nearly zero: the last digits of fp32 grow tenfold in four steps.
            assert row[name] == pytest.approx(other[name], rel=1e-5), (row["step"], name)


# ---- damage ------------------------------------------------------------------------------------------------------------


def truncate(checkpoint: Path) -> Path:
    file = checkpoint / "dense.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    return file


def flip_a_bit(checkpoint: Path) -> Path:
    file = checkpoint / "tables_00001_of_00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return file


def remove(checkpoint: Path) -> Path:
    (checkpoint / "state.json").unlink()
    return checkpoint / "state.json"


def add(checkpoint: Path) -> Path:
    (checkpoint / "tables_00000_of_00001.safetensors").write_bytes(b"")
    return checkpoint / "tables_00000_of_00001.safetensors"


def remove_manifest(checkpoint: Path) -> Path:
    (checkpoint / "manifest.json").unlink()
    return checkpoint


def cut_manifest(checkpoint: Path) -> Path:
    file = checkpoint / "manifest.json"
    file.write_bytes(file.read_bytes()[:-4])
    return file


@pytest.mark.parametrize("harm", [truncate, flip_a_bit, remove, add, remove_manifest, cut_manifest])
def test_harmed_checkpoint_is_passed_over_with_the_name_of_the_file(
    straight: Config, tmp_path: Path, harm: Callable[[Path], Path]
) -> None:
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(Path(straight.run.dir) / "run/checkpoints", checkpoints)
    assert newest_checkpoint(checkpoints) == (checkpoints / "step_00000005", {})
    harmed = harm(checkpoints / "step_00000005")
    newest, refused = newest_checkpoint(checkpoints)
    assert newest == checkpoints / "step_00000004"
    assert refused.keys() == {checkpoints / "step_00000005"}
    why = str(refused[checkpoints / "step_00000005"])
    assert str(harmed) in why and "\n" not in why


@pytest.mark.parametrize("pointer", ["", "step_0000", "step_00000009\n", None])
def test_a_damaged_pointer_costs_nothing(straight: Config, tmp_path: Path, pointer: str | None) -> None:
    checkpoints = shutil.copytree(Path(straight.run.dir) / "run/checkpoints", tmp_path / "checkpoints")
    (checkpoints / "latest").unlink()
    if pointer is not None:
        (checkpoints / "latest").write_text(pointer)
    assert newest_checkpoint(checkpoints) == (checkpoints / "step_00000005", {})


def test_where_no_checkpoint_is_intact_the_run_is_refused(straight: Config, tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "nothing") == (None, {})
    checkpoints = shutil.copytree(Path(straight.run.dir) / "run/checkpoints", tmp_path / "checkpoints")
    harmed = [truncate(path) for path in sorted(checkpoints.glob("step_*"))]
    with pytest.raises(RunError, match=f"^{harmed[-1]} is damaged .*, and no other checkpoint is intact; restore one"):
        newest_checkpoint(checkpoints)


@pytest.mark.thorough
def test_a_run_goes_on_from_the_newest_intact_checkpoint_and_says_so(straight: Config, tmp_path: Path) -> None:
    config = changed(branch(straight, 4, tmp_path), train__max_steps=5)
    harmed = flip_a_bit(tmp_path / "run/checkpoints/step_00000004")
    notes = run_ranks(notes_of, 2, config)
    assert notes == [[f"{harmed} is damaged or missing (its sha256 is not the manifest's); {GOING_ON}"], []]
    assert (tmp_path / "run/checkpoints/damaged_step_00000004").is_dir()
    expected = Path(straight.run.dir) / "run"
    for step in ("step_00000004", "step_00000005"):
        assert digests(tmp_path / "run/checkpoints" / step) == digests(expected / "checkpoints" / step)
    assert metric_rows(tmp_path / "run") == metric_rows(expected)


GOING_ON = "going on from step 3, the newest intact checkpoint."


def notes_of(config: Config) -> list[str]:
    """Train a run; what the user was told by this rank."""
    from distcond.train.loop import run_training

    notes: list[str] = []
    feeder = LocalFeeder(config, dist.get_rank(), config.cluster.num_workers)
    run_training(config, folder_of(config), feeder, asdict(config), notes.append)
    return notes


def test_checkpoint_of_another_format_is_refused(straight: Config, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(Path(straight.run.dir) / "run/checkpoints/step_00000005", tmp_path / "step")
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({**state, "format_version": 99}))
    with pytest.raises(RunError, match="has format 99; this version reads 1"):
        read_state(checkpoint)


FAILING_DISK = """
import pathlib, runpy, sys
left = pathlib.Path(__file__).with_name("left")

def watch(event, args):
    if event not in {"open", "os.mkdir", "os.rename", "os.rmdir"} or not str(args[0]).startswith(sys.argv[2]):
        return
    left.write_text(str(int(left.read_text()) - 1))
    if int(left.read_text()) < 0:
        raise OSError("no space left")

sys.addaudithook(watch)
runpy.run_path(SEALING, run_name="__main__")
"""
"The process that writes checkpoints, which may change their folder only so many more times, as on a disk that is full."


def save_on_a_failing_disk(config: Config) -> list[str]:
    """Save a run's next step while the disk fails at the first, second, ... change; what `latest` says each time."""
    from distcond.train import sealing
    from distcond.train.hooks import CheckpointHook
    from distcond.train.state import start_run

    folder, feeder = folder_of(config), LocalFeeder(config, 0, 1)
    program, left = folder.path / "failing_disk.py", folder.path / "left"
    program.write_text(FAILING_DISK.replace("SEALING", repr(sealing.__file__)))
    sealing.__file__ = str(program)
    run, named = start_run(config, folder, feeder, feeder.task), []
    run.step = 5
    for changes in range(1000):
        left.write_text(str(changes))
        CheckpointHook()._begin(run)
        assert run.writer.settle(60)
        named.append(verified_name(folder.checkpoints))
        if not run.writer.failure:
            left.write_text("1000")
            CheckpointHook()._begin(run)  # on a disk that works, it removes what the others left
            assert run.writer.settle(60)
            return named
        assert "no space left; it takes" in run.writer.failure and "bytes are free" in run.writer.failure
    raise AssertionError("a checkpoint takes more than 1000 changes of the disk")


def verified_name(checkpoints: Path) -> str:
    """The newest checkpoint; all that is there has to be complete."""
    newest, refused = newest_checkpoint(checkpoints)
    assert newest is not None and not refused
    return newest.name


def test_latest_never_names_an_incomplete_checkpoint(straight: Config, tmp_path: Path) -> None:
    moved = changed(branch(straight, 4, tmp_path), checkpoint__keep_last=1, **PLACES["1 rank, ZeRO 3"])
    (named,) = run_ranks(save_on_a_failing_disk, 1, moved)
    assert named == sorted(named) and set(named) == {"step_00000004", "step_00000005"}
    assert named.count("step_00000004") > 10  # files, their fsync, the moves into place
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert kept == ["latest", "step_00000002", "step_00000005"]  # the best and the last; nothing half-written stays


def test_only_the_last_checkpoints_are_kept(straight: Config) -> None:
    kept = sorted(path.name for path in (Path(straight.run.dir) / "run/checkpoints").iterdir())
    assert kept == ["latest", *(f"step_0000000{step}" for step in (2, 3, 4, 5))]


def test_the_summary_is_there_with_the_first_checkpoint_and_the_best_is_a_number(tmp_path: Path) -> None:
    config = small_config(tmp_path, cluster__num_workers=1, train__max_steps=6)
    (summaries,) = run_ranks(summaries_of, 1, config)
    assert summaries == {3: 2, 5: 4}
    checkpoints = tmp_path / "run/checkpoints"
    state = json.loads((checkpoints / "step_00000004/state.json").read_text())
    for value, kept in ((float("nan"), []), (0.5, ["step_00000004"])):
        (checkpoints / "step_00000004/state.json").write_text(json.dumps({**state, "validation": value}))
        prune_to = shutil.copytree(checkpoints, tmp_path / f"pruned_{value}")
        prune(prune_to, keep_last=1, keep_best=1)
        others = [path.name for path in sorted(prune_to.glob("step_*")) if path.name == "step_00000004"]
        assert others == kept


def train_without_room(config: Config) -> None:
    """Train where memory for copies of the state is never free."""
    from distcond.train import checkpoint_writer

    checkpoint_writer.MEMORY_SHARE = 10**12
    train_here(config)


@pytest.mark.thorough
def test_checkpoints_are_the_same_where_there_is_no_memory_for_a_copy(straight: Config, tmp_path: Path) -> None:
    run_ranks(train_without_room, 2, changed(straight, run__dir=str(tmp_path)))
    for step in ("step_00000004", "step_00000005"):
        assert digests(tmp_path / "run/checkpoints" / step) == digests(Path(straight.run.dir) / "run/checkpoints" / step)


def summaries_of(config: Config) -> dict[int, int]:
    """The step in summary.json when steps 3 and 5 are asked for."""
    found: dict[int, int] = {}

    class ReadingFeeder(LocalFeeder):
        def get(self, step: int, micro: int) -> Batch:
            if step in (3, 5):
                found[step] = json.loads(folder_of(config).summary_file.read_text())["step"]
            return super().get(step, micro)

    train_here(config, ReadingFeeder)
    return found
