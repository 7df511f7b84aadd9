import functools
import io
import json
import operator
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from rich.console import Console

from distcond.cluster import sweep_report
from distcond.cluster.policy import Room
from distcond.cluster.sweep import base_of, grace_steps, longer, name_sweep, num_at_once, plan, trial_name, validation_interval
from distcond.cluster.sweep_plot import plot
from distcond.cluster.sweep_report import Memory, Outcome, Status, Trial
from distcond.compose import compose, load_config, override, save_config, to_dict
from distcond.config import ClusterConfig, Config, SweepConfig, TrainConfig
from distcond.errors import ConfigError, DataError, RunError
from tests.cluster.processes import find_processes, wait_until, within
from tests.data.tokenizer import train_tokenizer
from tests.helpers import changed


def make_scheduler(config: Config) -> Any:
    # NOTE: imported here, because only the process that runs this file needs Tune.
    from distcond.cluster.tuning import make_scheduler

    return make_scheduler(config, grace_steps(config))


TINY = ["model=rnn", "data=parity", "model.width=8", "data.num_bits=4", "data.global_batch_size=8"]


@functools.cache
def tiny() -> Config:
    return compose(TINY)


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_trials_are_valid_runs_in_folders_of_their_own(tmp_path: Path) -> None:
    space = {"model.tree.depth": [0, 2], "optim.lr": {"min": 1e-4, "max": 1e-2, "scale": "log"}}
    config = changed(tiny(), run__dir=str(tmp_path), sweep__name="s", sweep__num_samples=3, sweep__space=space)
    trials = plan(name_sweep(config))
    assert len(trials) == 2 * 3
    assert len({trial.folder for trial in trials}) == 6
    for trial in trials:
        assert trial.folder.parent == tmp_path / "s"
        assert trial.config.model.tree.depth == trial.overrides["model.tree.depth"]
        assert trial.config.optim.lr == trial.overrides["optim.lr"]
        assert trial.config.tracking.group == "s"
        assert trial.config.sweep == SweepConfig()


@pytest.mark.parametrize(
    ("words", "key", "typed", "absolute"),
    [
        (["data=text", "data.files=[x]"], "data.files", ["corpus/a.txt", "b/*.txt"], ["{}/corpus/a.txt", "{}/b/*.txt"]),
        (["data=stdlib"], "data.tokenizer", "tok.json", "{}/tok.json"),
        (["data=stdlib"], "data.cache_dir", "~/c", "~/c"),
        (["data=mixture", "data.sources={a:{name:text,files:[x],weight:1}}"], "data.sources.a.files", ["a.txt"], ["{}/a.txt"]),
    ],
)
def test_a_local_path_of_a_space_is_the_same_file_from_every_folder(
    words: list[str], key: str, typed: Any, absolute: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train_tokenizer(tmp_path / "tok.json", "some text")
    config = name_sweep(changed(compose(["model=rnn", *words]), sweep__name="s", sweep__space={key: [typed]}))
    (trial,) = plan(config)
    made = functools.reduce(operator.getitem, key.split("."), to_dict(trial.config))
    assert json.dumps(made) == json.dumps(absolute).replace("{}", str(tmp_path))
    assert (trial.overrides, trial.name) == ({key: typed}, trial_name(0, {key: typed}))
    monkeypatch.chdir(_folder(tmp_path / "elsewhere"))  # as a driver does
    assert Trial.of(base_of(config), **trial.told).config == trial.config


def test_a_sweep_has_a_name_and_an_absolute_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = name_sweep(Config())
    assert config.run.dir == str(tmp_path / "runs")
    assert config.sweep.name.startswith("sweep-")
    with pytest.raises(ConfigError, match="must be a plain folder name"):
        name_sweep(Config(sweep=SweepConfig(name="a/b")))


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"model.tree.dpth": [1, 2]}, r"model.tree.dpth=1\): .*dpth.*did you mean model.tree.depth"),
        ({"model.tree.depth": [2, "deep"]}, r"model.tree.depth=deep\): .*model.tree.depth"),
        ({"model.tree.depth": [2, 99]}, r"model.tree.depth=99\): model.tree.depth=99 is outside 0..62"),
        ({"model.halting.kind": ["act", "never"]}, r"model.halting.kind=never\): .*never"),
        ({"model.width": {"min": -3, "max": -1}}, r"model.width=-\d\): model.width=-\d is below 1"),
        ({"data.name": ["parity", "stdlib"]}, "sweep.space mixes text and tasks"),
        ({"data.context": [16, 32]}, r"data.context=16\): data.context=16 is read by data=stdlib, .*, not by data=parity"),
    ],
)
def test_a_trial_that_cannot_run_is_refused_before_anything_starts(space: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = changed(tiny(), run__dir=f"{tmp_path}/runs", sweep__space=space)
    with pytest.raises(ConfigError, match=message) as error:
        plan(name_sweep(config))
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_optuna_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    config = name_sweep(changed(tiny(), sweep__search="optuna", sweep__space={"optim.lr": {"min": 0.1, "max": 0.2}}))
    with pytest.raises(ConfigError, match=r"sweep.search=optuna needs the package optuna, .* pip install 'distcond\[optuna\]'"):
        plan(config)


def test_a_trial_may_need_all_of_its_overrides_to_be_valid() -> None:
    space = {"model.tree.depth": [4], "model.tree.full_depth": [3]}
    assert len(plan(name_sweep(changed(tiny(), sweep__space=space)))) == 1


def test_the_shipped_sweep_is_valid_for_the_default_model() -> None:
    trials = plan(name_sweep(compose(["sweep=depth_x_penalty", "cluster.num_workers=1"])))
    assert len(trials) == 4 * 3


def test_names_are_folder_names() -> None:
    assert trial_name(7, {"model.tree.depth": 4, "optim.lr": 0.001}) == "007-depth=4-lr=0.001"
    assert trial_name(0, {"optim.betas": [0.9, 0.95], "data.path": "a/../b"}) == "000-betas=_0.9_0.95_-path=a_.._b"
    assert len(trial_name(1, {"data.path": "x" * 300})) <= 80


@pytest.mark.parametrize(
    ("max_steps", "eval_every", "grace", "interval"),
    [(50, 100, 13, 13), (1000, 100, 250, 250), (1000, 50, 250, 50), (1, 100, 1, 1), (400, 100, 100, 100)],
)
def test_a_validation_falls_on_every_rung(max_steps: int, eval_every: int, grace: int, interval: int) -> None:
    from ray.tune.schedulers import ASHAScheduler

    config = Config(train=TrainConfig(max_steps=max_steps, eval_every=eval_every))
    assert grace_steps(config) == grace
    assert validation_interval(config) == interval
    scheduler = make_scheduler(config)
    if isinstance(scheduler, ASHAScheduler):
        milestones = [milestone for milestone, _ in scheduler._brackets[0]._rungs]
        assert milestones[-1] == grace
        assert all(milestone % interval == 0 and milestone < max_steps for milestone in milestones)


def test_asha_stops_the_worse_at_a_rung_and_nobody_at_the_last_step() -> None:
    config = Config(train=TrainConfig(max_steps=40), sweep=SweepConfig(asha_grace=0.25))
    bracket = make_scheduler(config)._brackets[0]
    good, bad = (_FakeTrial(name) for name in ("good", "bad"))
    assert bracket.on_result(good, 10, -1.0) == "CONTINUE"
    assert bracket.on_result(bad, 10, -2.0) == "STOP"
    scheduler = make_scheduler(config)
    for trial, error in ((good, 1.0), (bad, 2.0)):
        scheduler.on_trial_add(None, trial)
        for step in (10, 20, 30, 40):
            bad_from_now_on = error if step == 40 else 1.0
            result = {"step": step, "val/bpb": bad_from_now_on}
            assert scheduler.on_trial_result(None, trial, result) == "CONTINUE"


class _FakeTrial:
    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id


def test_without_steps_to_save_nobody_is_stopped_early() -> None:
    from ray.tune.schedulers import FIFOScheduler

    for config in (Config(sweep=SweepConfig(asha_grace=1.0)), Config(train=TrainConfig(max_steps=1))):
        assert isinstance(make_scheduler(config), FIFOScheduler)


@pytest.mark.parametrize(
    ("cpus", "workers", "limit", "expected"),
    [(2, [2, 2], None, 1), (8, [2, 2, 2], None, 3), (8, [2, 4], None, 2), (8, [1] * 9, 3, 3)],
)
def test_as_many_trials_at_once_as_the_largest_leaves_room_for(
    cpus: int, workers: list[int], limit: int | None, expected: int
) -> None:
    trials = [Trial(str(n), {}, Config(cluster=ClusterConfig(num_workers=n))) for n in workers]
    assert num_at_once(trials, Room(cpus=cpus, gpus=0), limit) == expected


# --- what came out ----------------------------------------------------------------------------------------------------


def _trial(folder: Path, max_steps: int = 50) -> Trial:
    config = changed(tiny(), run__dir=str(folder), run__name="a", train__max_steps=max_steps)
    (folder / "a").mkdir()
    return Trial("a", {"model.tree.depth": 2}, config)


def test_an_outcome_is_what_the_run_folder_says(tmp_path: Path) -> None:
    trial = _trial(tmp_path)
    rows: list[dict[str, float]] = [
        {"step": 10, "train/loss": 1.0},
        {"step": 13, "val/sequence_error": 0.5, "val/ponder/steps": 2.5},
        {"step": 20, "train/loss": 0.9},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (trial.folder / "metrics.jsonl").write_text(text + '{"step": 30, "tra')
    outcome = sweep_report.read_outcome(trial, Memory(started={"a"}))
    assert (outcome.status, outcome.steps, outcome.quality, outcome.ponder_steps) == (Status.stopped, 20, 0.5, 2.5)
    assert outcome.command == f"distcond train --config {tmp_path}/a/config.yaml"
    failed = sweep_report.read_outcome(trial, Memory(started={"a"}, failed={"a"}))
    assert (failed.status, failed.error) == (Status.failed, "its process died")
    finished = replace(trial, config=replace(trial.config, train=TrainConfig(max_steps=20)))
    assert sweep_report.read_outcome(finished, Memory(started={"a"})).status == Status.finished


def test_a_trial_that_never_started_has_no_figures(tmp_path: Path) -> None:
    outcome = sweep_report.read_outcome(_trial(tmp_path), Memory())
    assert (outcome.status, outcome.steps, outcome.quality) == (Status.not_run, 0, None)


def _outcome(name: str, quality: float | None, steps: float | None, status: Status = Status.finished) -> Outcome:
    error = "a worker died" if status == Status.failed else None
    return Outcome(name, {"model.tree.depth": 2}, status, 50, quality, steps, 1000, f"/runs/s/{name}", error, True)


def test_table_and_file_tell_the_same_front(tmp_path: Path) -> None:
    outcomes = [
        _outcome("cheap", 2.5, 1.0),
        _outcome("good", 2.1, 3.0),
        _outcome("beaten", 2.6, 2.0),
        _outcome("failed", 1.0, 1.0, Status.failed),
        _outcome("early", None, None, Status.stopped),
    ]
    assert [outcome.name for outcome in sweep_report.best(outcomes)] == ["cheap", "good"]
    sweep_report.save(tmp_path / "sweep.json", "s", "val/bpb", outcomes)
    saved = json.loads((tmp_path / "sweep.json").read_text())
    assert saved["pareto"] == ["cheap", "good"]
    assert [trial["pareto"] for trial in saved["trials"]] == [True, True, False, False, False]
    assert {trial["status"] for trial in saved["trials"]} == {"finished", "failed", "stopped"}
    screen = io.StringIO()
    sweep_report.show(Console(file=screen, width=150), tmp_path, "val/bpb", outcomes)
    shown = screen.getvalue()
    assert sum(line.lstrip("│ ").startswith("*") for line in shown.splitlines()) == 2
    assert "val/bpb 2.1 at 3 ponder steps: distcond train --config /runs/s/good/config.yaml" in shown
    assert "failed: a worker died (logs: /runs/s/failed/logs)" in shown


@pytest.mark.thorough
def test_the_picture_shows_what_was_judged(tmp_path: Path) -> None:
    from matplotlib.image import imread

    outcomes = [_outcome("cheap", 2.5, 1.0), _outcome("good", 2.1, 3.0), _outcome("bad", 9.0, 1.0, Status.failed)]
    assert plot(tmp_path / "a.png", "s", "val/bpb", outcomes)
    assert plot(tmp_path / "b.png", "s", "val/bpb", outcomes[:1])
    first, second = imread(tmp_path / "a.png"), imread(tmp_path / "b.png")
    assert first.shape == second.shape == (450, 700, 4)
    assert (first != second).any()
    assert not plot(tmp_path / "c.png", "s", "val/bpb", [_outcome("early", None, None, Status.stopped)])
    assert not (tmp_path / "c.png").exists()


@pytest.mark.parametrize("sweep", ["depth_x_penalty", "depth_x_target_steps"])
@pytest.mark.thorough
def test_the_winner_can_be_trained_for_longer_by_one_line(tmp_path: Path, sweep: str) -> None:
    config = compose([f"sweep={sweep}", f"run.dir='{tmp_path}/a b'", "sweep.name=s", "optim=adam", "data.context=64"])
    trials = plan(name_sweep(config))
    outcomes = [replace(_outcome(trial.name, 2.0 + index, 1.0), is_over=True) for index, trial in enumerate(trials)]
    words = shlex.split(longer(trials, outcomes))
    assert words[:2] == ["distcond", "train"]
    again, won = compose(words[2:]), trials[0].config
    assert again == changed(
        won, run__dir=f"{tmp_path}/a b", run__name=f"s-{trials[0].name}", train__max_steps=4 * won.train.max_steps
    )
    assert longer(trials, [_outcome(trials[0].name, None, None)]) == ""


# --- interrupted sweeps -----------------------------------------------------------------------------------------------


def _past(folder: Path, trials: list[Trial], memory: Memory) -> None:
    for trial in trials:
        if trial.name in memory.started:
            save_config(trial.config, _folder(trial.folder) / "config.yaml")
    outcomes = [sweep_report.read_outcome(trial, memory) for trial in trials]
    sweep_report.save(folder / "sweep.json", "s", "val/bpb", outcomes)


@pytest.mark.thorough
def test_what_is_over_is_kept_and_the_rest_is_run(tmp_path: Path) -> None:
    space = {"model.tree.depth": [0, 2, 3, 4, 5]}
    config = changed(tiny(), run__dir=str(tmp_path), sweep__name="s", sweep__space=space)
    trials = plan(name_sweep(config))
    finished, stopped, failed, interrupted = (trial.name for trial in trials[:4])
    assert sweep_report.read_past(tmp_path / "s/sweep.json", trials) == set()
    over = {finished, stopped, failed}
    _past(tmp_path / "s", trials, Memory(started=over | {interrupted}, ended=over, failed={failed}))
    assert sweep_report.read_past(tmp_path / "s/sweep.json", trials) == {finished, stopped}
    more = plan(name_sweep(changed(config, sweep__space={"model.tree.depth": [0, 2, 3, 4, 5, 6]})))
    assert sweep_report.read_past(tmp_path / "s/sweep.json", more) == {finished, stopped}
    other = plan(name_sweep(changed(config, sweep__space={"model.tree.depth": [1, 2]})))
    with pytest.raises(RunError, match=r"s holds another sweep \(it has 000-depth=0, this one has not\); use another sweep.name"):
        sweep_report.read_past(tmp_path / "s/sweep.json", other)
    faster = plan(name_sweep(changed(config, optim__lr=0.5)))
    with pytest.raises(RunError, match=r"000-depth=0 holds a run with other settings: optim.lr=0.5"):
        sweep_report.read_past(tmp_path / "s/sweep.json", faster)
    (tmp_path / "s/sweep.json").write_text('{"trials": [')
    with pytest.raises(RunError, match=r"sweep.json is damaged"):
        sweep_report.read_past(tmp_path / "s/sweep.json", trials)


def test_trials_whose_paths_were_kept_as_typed_are_still_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = changed(compose(["model=rnn", "data=text", "data.files=[x]"]), run__dir=str(tmp_path), sweep__name="s")
    (trial,) = trials = plan(name_sweep(changed(config, sweep__space={"data.files": [["a.txt"]]})))
    _past(tmp_path / "s", trials, Memory(started={trial.name}, ended={trial.name}))
    save_config(override(trial.config, trial.overrides), trial.folder / "config.yaml")
    assert sweep_report.read_past(tmp_path / "s/sweep.json", trials) == {trial.name}


# --- drivers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_kept", [False, True])
@pytest.mark.parametrize(
    ("error", "line"),
    [(DataError("tok.json:\nno such file"), "tok.json: no such file"), (KeyError("step"), "KeyError: 'step'")],
)
def test_an_error_of_a_driver_is_told(
    error: Exception, line: str, *, is_kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distcond.cluster import tuning

    def fails(config: Config) -> str:
        raise error

    monkeypatch.setattr(tuning, "quality_metric", fails)
    monkeypatch.setattr(tuning, "prepare_run", lambda config: None)
    monkeypatch.setattr(tuning, "fit", lambda config: None)
    trial, driver = _trial(tmp_path), tuning.Driver.__new__(tuning.Driver)
    _folder(tmp_path / "logs")
    with pytest.raises(type(error)):
        driver.setup({"trial": trial.told}, trial.config, frozenset({"a"} if is_kept else ()))
        driver.step()
    outcome = sweep_report.read_outcome(trial, Memory(started={"a"}, failed={"a"}))
    assert (outcome.status, outcome.error) == (Status.failed, line)


def test_a_driver_tells_why_it_cannot_make_its_trial(tmp_path: Path) -> None:
    from distcond.cluster import tuning

    trial, driver = _trial(tmp_path), tuning.Driver.__new__(tuning.Driver)
    _folder(tmp_path / "logs")
    with pytest.raises(ConfigError):
        driver.setup({"trial": {"name": "a", "overrides": {"model.width": 0}}}, trial.config, frozenset())
    assert trial.error_file.read_text().startswith("model.width=0 is below 1")


# --- whole sweeps -----------------------------------------------------------------------------------------------------


def test_a_bad_space_is_one_line_and_no_ray(tmp_path: Path) -> None:
    done = within(5, lambda: _sweep(tmp_path, "+sweep.space={model.tree.dpth:[1,2]}"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "did you mean model.tree.depth" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ray
@pytest.mark.thorough
def test_a_killed_sweep_goes_on_and_trials_finish_stop_early_or_fail_and_leave_room(shared_ray: Room, tmp_path: Path) -> None:
    # One bit of parity is learnt at once or, without a learning rate, never. A folder that holds another run fails.
    save_config(compose(["seed=5"]), _folder(tmp_path / "s" / "003-lr=0.01") / "config.yaml")
    (tmp_path / "s" / "003-lr=0.01" / "metrics.jsonl").touch()
    words = [
        *("sweep.name=s", "+sweep.space={optim.lr:[0.03,1.0e-9,0.02,0.01]}", "data.num_bits=1", "model.width=16"),
        *("train.max_steps=400", "checkpoint.every=20", "sweep.asha_grace=0.1", "seed=1"),  # wrong before it has learnt
        *("cluster.num_workers=1", f"cluster.cpus_per_worker={shared_ray.cpus}"),
    ]
    address = ray.get_runtime_context().gcs_address
    killed = subprocess.Popen(
        [sys.executable, "-m", "distcond", "sweep", *TINY, f"run.dir={tmp_path}", *words],
        env=os.environ | {"RAY_ADDRESS": address},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    first, second, third = (tmp_path / "s" / name for name in ("000-lr=0.03", "001-lr=1e-09", "002-lr=0.02"))
    # A trial fills this Ray: the third could not run if anything of the second, stopped early, were left.
    wait_until(lambda: (third / "checkpoints/latest").exists() or killed.poll() is not None)
    assert killed.poll() is None
    os.killpg(killed.pid, signal.SIGKILL)  # nothing is said or saved any more
    killed.communicate()
    trials = _saved(tmp_path)["trials"]
    assert [trial["status"] for trial in trials] == ["finished", "stopped", "not run", "not run"]
    assert [trial["is_over"] for trial in trials] == [True, True, False, False]
    rows = (first / "metrics.jsonl").read_bytes()

    done = _sweep(tmp_path, *words, RAY_ADDRESS=address)
    assert done.returncode == 1, done.stderr
    assert "4 trials, 1 at a time, 2 of them done before" in done.stdout
    saved = _saved(tmp_path)
    assert [trial["status"] for trial in saved["trials"]] == ["finished", "stopped", "finished", "failed"]
    assert (first / "metrics.jsonl").read_bytes() == rows
    best, worse, other, failed = saved["trials"]
    assert (best["steps"], best["quality"], best["ponder_steps"]) == (400, 0.0, 1.0)
    assert 40 <= worse["steps"] < 400
    assert other["quality"] == 0.0
    steps = [json.loads(line)["step"] for line in (third / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 400
    assert "holds a run with other settings" in failed["error"]
    assert saved["pareto"] == [best["name"], other["name"]]
    assert f"{failed['folder']}/logs" in done.stdout
    assert (tmp_path / "s/pareto.png").stat().st_size > 1000
    assert "Train the best for longer:\n  distcond train " in done.stdout
    # Stopped early, a trial has saved itself as any run does, and is a run like any other.
    summary = json.loads((second / "summary.json").read_text())
    assert (summary["stopped"], summary["step"]) == (True, worse["steps"])
    assert load_config(second / "config.yaml").optim.lr == 1e-9
    # Ray ends what a finished trial has left a moment later.
    wait_until(lambda: not any(map(find_processes, ("RayTrainWorker", "_DataActor", "_Controller"))), timeout_s=5)
    wait_until(lambda: ray.available_resources().get("CPU") == shared_ray.cpus, timeout_s=5)


def _saved(folder: Path) -> dict[str, Any]:
    saved: dict[str, Any] = json.loads((folder / "s" / "sweep.json").read_text())
    return saved


def _sweep(folder: Path, *overrides: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "distcond", "sweep", *TINY, f"run.dir={folder}", *overrides],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=400,
    )


def _folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path
