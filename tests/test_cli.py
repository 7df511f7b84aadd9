"""distcond.cli: the words it understands, what it refuses and how fast, its exit status. Verbs are tested elsewhere."""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from distcond import __version__, cli
from distcond.cli import main
from distcond.errors import ClusterError
from tests.helpers import HANG_S

ROOT = Path(__file__).parents[1]


def run(*argv: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", "distcond", *argv]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=HANG_S, check=False)


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("distcond: error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"], ["help"]])
def test_help_shows_every_verb_with_an_example(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert all(out.count(f"distcond {verb} ") >= 2 for verb in cli.VERBS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"distcond {__version__}\n"


@pytest.mark.parametrize("verb", ["sweep", "submit", "evaluate", "export", "predict", "explain"])
def test_verbs_have_their_own_help(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert f"usage: distcond {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ("trian", "did you mean distcond train?"),
        ("model=rnn", "did you mean distcond train model=rnn?"),
        (
            "list",
            "'list' is none of train, sweep, submit, prepare, evaluate, report, explain, export, predict, sync, bench; `dist",
        ),
        ("train --dryrun", "did you mean --dry-run?"),
        ("train --cfg jbo", "invalid choice: 'jbo'"),
        ("train --cfg job modle=rnn", "there is no key modle; did you mean model?"),
        ("train --help modle=rnn", "there is no key modle; did you mean model?"),
        ("train --package model", "--package and --resolve go with --cfg"),
        ("train -m seed=1,2", "a search over values is `distcond sweep`"),
        ("sweep --multirun", "a search over values is `distcond sweep`"),
        ("train modle=rnn", "there is no key modle; did you mean model?"),
        ("train modle=rnn --dry-run", "there is no key modle; did you mean model?"),
        ("train optim.deepspeed={optimizer:{}} --dry-run", "optim.deepspeed.optimizer is derived by distcond"),
        ("train --config no/config.yaml", "no/config.yaml: no such file or directory."),
        ("train --config config.yaml seed=1", "config.yaml is run as it is; remove seed=1"),
        ("train --config config.yaml --config-dir x", "config.yaml is run as it is; remove --config-dir"),
        ("train --config config.yaml --cfg job", "config.yaml is resolved already"),
        ("train --config-dir no/such", "--config-dir no/such: no such folder."),
        ("-sc", "-sc was given nothing; needed is install= or uninstall=bash, zsh or fish, e.g. -sc install=bash."),
        ("-sc install=tcsh", "-sc was given install=tcsh; needed is install="),
        ("train -sc model=rnn", "-sc was given model=rnn; needed is install="),
        ("train --experimental-rerun x", "unrecognized arguments: --experimental-rerun"),
        (
            "train data.files=[*.txt] --dry-run",
            "data.files=['*.txt'] is read by data=text, hub, mixture, not by data=stdlib; use",
        ),
        ("prepare data.files=[*.txt]", "use data=text, or leave data.files out."),
        ("train data=text data.files=[*.txt] --dry-run", "data.files: '{here}/*.txt' matches no file"),
        ("train data=hub data.path=json data.files=[a.json] --dry-run", "data.files: '{here}/a.json' matches no file"),
        (
            "train data=text data.files=['~nobody-here/a'] --dry-run",
            "~nobody-here/a: nobody here has such a home; write the whole path",
        ),
        ("train run.dir='~nobody-here/a' --dry-run", "run.dir=~nobody-here/a: nobody here has such a home; write the whole path"),
        ("train cluster.gpus_per_worker=1000 --dry-run", "cluster.num_workers=2 x 1000 GPU asks for 2000 GPUs; this machine has"),
        ("train cluster.num_workers=16 cluster.cpus_per_worker=99 --dry-run", "asks for 1584 CPUs; this machine has"),
        ("train cluster.num_workers=1000", "cluster.num_workers=1000 is more than data.global_batch_size=16"),
        ("train optim.accumulation=32", "cluster.num_workers=2 x optim.accumulation=32 is more than data.global_batch_size=16"),
        (
            "train cluster.num_workers=3",
            "data.global_batch_size=16 is not divisible by cluster.num_workers x optim.accumulation = 3",
        ),
        ("train run.fork=true", "run.fork=true needs the run to start from; give run.name"),
        ("train run.fork=true run.name=x data.files=[a.txt]", "run.fork=true: runs/x holds no run to start from"),
        ("sweep sweep=nope", "there is no sweep/nope.yaml; sweep has depth_x_penalty"),
        ("submit", "submit was given nothing; needed is train or sweep"),
        ("submit cluster=ray", "submit was given cluster=ray; needed is train or sweep"),
        ("submit train cluster=rya", "cluster has kuberay, local, ray, slurm; did you mean ray?"),
        ("evaluate", "the following arguments are required: RUN"),
        ("evaluate no/run", "no/run is not a run folder"),
        ("report no/run --out x.html", "no/run is not a run folder"),
        ("report", "the following arguments are required: RUN"),
        ("evaluate no/run --step last", "invalid int value: 'last'"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: str, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert told.replace("{here}", str(tmp_path)) in refusal(capsys, *argv.split())
    assert not list(tmp_path.iterdir())


def test_a_log_level_that_is_none_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTCOND_LOG", "loud")
    assert "DISTCOND_LOG=LOUD is not a level" in refusal(capsys, "train")


def test_a_user_error_of_a_verb_is_status_2(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.VERBS, "train", raising(ClusterError("8 workers need 8 cores;\n2 are there.")))
    assert refusal(capsys, "train") == "distcond: error: 8 workers need 8 cores; 2 are there.\n"


def test_a_failure_is_status_1_one_line_and_a_kept_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    failure = RuntimeError("worker 1 died")
    failure.add_note("Its log is runs/x/logs.")
    monkeypatch.setitem(cli.VERBS, "train", raising(failure))
    assert main(["train"]) == 1
    err = capsys.readouterr().err
    (log,) = tmp_path.iterdir()
    assert err == f"distcond: failed: worker 1 died Its log is runs/x/logs. (traceback: {log})\n"
    assert "RuntimeError: worker 1 died" in log.read_text()


def test_an_interrupt_is_status_130(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.VERBS, "train", raising(KeyboardInterrupt()))
    assert main(["train"]) == 130


def raising(error: BaseException) -> Callable[[list[str]], int]:
    def verb(argv: list[str]) -> int:
        raise error

    return verb


def test_hydra_flags_may_stand_between_overrides(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "model=rnn", "--cfg", "job", "data=logic", "--package", "data"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# @package data\n") and yaml.safe_load(out)["name"] == "logic"
    assert main(["train", "-c", "job", "-p", "run.name", "--resolve", "run.name=s${seed}"]) == 0
    assert capsys.readouterr().out == "s0\n"
    assert not list(tmp_path.iterdir())


def test_hydra_flags_see_own_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("name: text\nfiles: [a]\n")
    assert main(["train", "--config-dir", str(tmp_path), "data=mine", "--cfg", "job", "--package", "data.files"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == ["a"]


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["train", "--help"], "--config-dir DIR  add your own files"),
        (["train", "--hydra-help"], "Hydra (1.3."),
    ],
)
@pytest.mark.thorough
def test_hydra_answers_its_own_flags_and_leaves_nothing_behind(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], shown: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert shown in out and err == ""
    assert not list(tmp_path.iterdir())


def test_hydra_answers_a_process_of_its_own(tmp_path: Path) -> None:
    done = run("train", "--info", "defaults-tree", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\n    model: transformer\n" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_misspelt_key_is_refused_in_three_seconds_of_a_processor(tmp_path: Path) -> None:
    before = processor_s_of_children()
    done = run("train", "model.tree.dpth=3", cwd=tmp_path)
    assert processor_s_of_children() - before < 3
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "distcond: error: there is no key model.tree.dpth; did you mean model.tree.depth?\n"
    assert not list(tmp_path.iterdir())


def processor_s_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_a_run_is_composed_judged_and_its_start_prepared_without_anything_heavy() -> None:
    heavy = {"torch", "ray", "deepspeed", "wandb", "datasets"}
    code = f"""
import sys, distcond.cli, distcond.compose
config = distcond.compose.compose([])
print({heavy | {"numpy"}!r} & set(sys.modules))
import distcond.cluster.trainer, distcond.train.fits
distcond.train.fits.check_fits(config)
print({heavy!r} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG_S, check=True)
    assert done.stdout == "set()\nset()\n"


@pytest.mark.skipif(not shutil.which("bash"), reason="completion is bash's")
def test_tab_completes_in_a_real_bash(tmp_path: Path) -> None:
    command = tmp_path / "distcond"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m distcond "$@"\n')
    command.chmod(0o755)
    script = """
        eval "$(distcond -sc install=bash)"
        complete -p distcond >/dev/null || exit 3
        COMP_LINE='distcond train --dry-run mod'; COMP_POINT=${#COMP_LINE}; COMP_CWORD=3
        hydra_bash_completion; echo "${COMPREPLY[@]}"
    """
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=HANG_S, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "model. model=\n", "")


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("distcond ", "train sweep submit prepare evaluate report explain export predict sync bench"),
        ("distcond export runs/a --", "--out --step --flatten --max-mib --bf16"),
        ("distcond predict ", ""),
        ("distcond bench ", "tree table exchange train halting"),
        ("distcond bench tree --", "--json --kernels --quick --help"),
        ("distcond bench table --", "--json --kernels --quick --large --help"),
        ("distcond train model=", "model=mlp model=rnn model=transformer"),
        ("distcond submit sweep model.tree.de", "model.tree.depth="),
        ("distcond submit ", "train sweep"),
        ("distcond train --config-dir {own} data=min", "data=mine"),
        ("distcond train --config ", ""),
        ("distcond evaluate ru", ""),
        ("distcond report runs/a --", "--out"),
        ("distcond sweep --", "--config --config-dir --help"),
        ("distcond train model.tree.depth=[ model=", ""),
    ],
)
def test_completion_offers_what_may_follow(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str, offered: str
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("name: text\n")
    monkeypatch.setenv("COMP_LINE", line.format(own=tmp_path))
    assert main(["-sc", "query=bash"]) == 0
    out, err = capsys.readouterr()
    assert (out.strip(), err) == (offered, "")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["predict", "model", "--seed", "1", "lines.txt"], "lines.txt is no file"),
        (["report", "first", "--out", "page.html", "second"], "first is not a run folder"),
        (["evaluate", "first", "--step", "1"], "first is not a run folder"),
    ],
)
def test_options_may_stand_between_what_they_are_for(
    argv: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert told in refusal(capsys, *argv)


@pytest.mark.parametrize("argv", [["bench", "table", "--quick"], ["explain", "run", "--input", "[1]"]])
def test_a_result_that_could_not_be_written_is_refused_before_it_is_computed(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"--json {tmp_path} is a folder; give a file in it, e.g. {tmp_path}/" in refusal(
        capsys, *argv, "--json", str(tmp_path)
    )
    missing = tmp_path / "no" / "rows.json"
    assert "is not a folder; create it first." in refusal(capsys, *argv, "--json", str(missing))


@pytest.mark.parametrize("verb", [["train"], ["train", "--dry-run"]])
def test_a_run_that_could_not_be_written_is_refused_at_once(
    verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    words = ["model=rnn", "data=parity", "cluster.num_workers=1", "run.name=a", f"run.dir={tmp_path}/file"]
    assert f"{tmp_path}/file is no folder; choose another run.dir or run.name." in refusal(capsys, *verb, *words)
    words[-1] = "run.dir=/proc/none"
    if verb == ["train"] and os.getuid() == 0:  # a folder that only the attempt shows to be closed, to root
        assert "/proc/none/a cannot be written to" in refusal(capsys, *verb, *words)
