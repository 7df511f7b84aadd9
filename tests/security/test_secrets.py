"""Secrets planted in the environment, the configuration and the git remote never reach a file of a run, a job or the screen."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
import pytest

from distcond.cli import main
from distcond.cluster.memory import NoMemoryError
from distcond.redaction import has_password, is_secret, redact
from distcond.tracking import Tracker, WandbRun
from tests.cluster.processes import SLOW_START, is_alive, processes_of, signal_all, wait_until
from tests.helpers import HANG_S

pytestmark = pytest.mark.thorough

WORD = "hunter2"
"In every planted secret."
PLANTED = {
    "WANDB_API_KEY": f"{WORD}key{'0' * 30}",
    "HF_TOKEN": f"{WORD}-token",
    "RAY_AUTH_TOKEN": f"{WORD}-ray-token",
    "MY_SECRET": f"{WORD}-secret",
    "DB_PASSWORD": f"{WORD}-password",
    "WANDB_BASE_URL": f"http://joe:{WORD}-url@127.0.0.1:9",
}
URL = f"https://joe:{WORD}@127.0.0.1:9/x"


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    yield
    found = [file for file in tmp_path.rglob("*") if file.is_file() and WORD.encode() in file.read_bytes()]
    assert not found


def wait_for_end(writers: Iterable[psutil.Process]) -> None:
    """Before their files are searched, of which none may vanish meanwhile or be written later."""
    wait_until(lambda: not any(map(is_alive, writers)))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"no answer at {URL}, but", "no answer at https://***@127.0.0.1:9/x, but"),
        ("git+ssh://git@host/a and a@b", "git+ssh://***@host/a and a@b"),
        ("https://host/a@b?c@d", "https://host/a@b?c@d"),
        ("https://a:p@s@host", "https://***@host"),
        (f"sent {PLANTED['HF_TOKEN']}.", "sent ***."),
        ("MY_KEY is short", "MY_KEY is short"),
    ],
)
def test_redacted_text_hides_secrets_and_nothing_else(text: str, shown: str) -> None:
    assert redact(text, {**PLANTED, "MY_KEY": "short"[:2], "HOME": "no answer"}) == shown


def test_what_a_rank_fails_with_is_told_without_secrets() -> None:
    from distcond.cluster.ray_train import _one_line

    for error in (RuntimeError(f"no answer at {URL} with {PLANTED['HF_TOKEN']}"), NoMemoryError(f"{URL}")):
        assert WORD not in _one_line(error, "lost")


def test_what_counts_as_secret() -> None:
    assert all(is_secret(name) for name in ("WANDB_API_KEY", "hf_token", "Secret", "DB_PASSWORD"))
    assert (
        not is_secret("WANDB_BASE_URL")
        and not is_secret("tokenizer")
        and is_secret("tokenizer_key")
        and not has_password("ssh://git@host")
        and has_password(URL)
    )


@pytest.mark.parametrize(
    "words",
    [
        f"train --dry-run data=text data.files=['{URL}']",
        f"train data=hub data.path=json data.files=['{URL}']",
        f"train cluster.address='{URL}'",
        f"train --dry-run seed='{URL}'",
        f"train --dry-run +a.b='{URL}'",
        f"train --dry-run optim.deepspeed.comet.api_key={WORD}",
        f"train --dry-run tracking.mode={PLANTED['HF_TOKEN']}",
        f"submit train cluster=ray cluster.address='{URL}'",
        f"submit train --dry-run cluster=ray cluster.address='{URL}'",
        f"submit train --dry-run cluster=slurm run.name='{URL}'",
        f"sweep sweep.space.data.files=[['{URL}']]",
    ],
)
def test_a_secret_in_a_configuration_is_refused_and_not_repeated(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split(" ")) == 2
    out, err = capsys.readouterr()
    assert WORD not in out + err and out == "" and err.count("\n") == 1


@pytest.mark.parametrize("variable", ["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"])
@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_an_address_from_the_environment_is_shown_without_its_password(
    variable: str, dry: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, f"http://joe:{WORD}@127.0.0.1:9")
    assert main(["submit", "train", *dry, "cluster=ray", "run.name=a"]) == (0 if dry else 2)
    shown = "".join(capsys.readouterr())
    assert WORD not in shown and "http://***@127.0.0.1:9" in shown
    if dry:
        job = json.loads(shown[shown.index("{") : shown.index("\n# package")])
        assert job["runtime_env"]["env_vars"]["WANDB_BASE_URL"] == "http://127.0.0.1:9"


def test_a_batch_script_and_its_configuration_hold_no_secret(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["submit", "train", "cluster=slurm", "run.name=a"]) == 2  # no sbatch here: both are left for it
    assert (tmp_path / "runs/a/submit.sbatch").is_file() and (tmp_path / "runs/a/submit.yaml").is_file()
    assert WORD not in "".join(capsys.readouterr())


def test_a_failure_and_its_traceback_hide_secrets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(argv: list[str]) -> int:
        raise RuntimeError(f"{URL} refuses {PLANTED['HF_TOKEN']}")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setitem(__import__("distcond.cli").cli.VERBS, "train", fail)
    assert main(["train"]) == 1
    assert "failed: https://***@127.0.0.1:9/x refuses *** (traceback" in capsys.readouterr().err
    assert len(list(tmp_path.glob("distcond-*.log"))) == 1


@pytest.mark.parametrize("mode", ["offline", "auto"])
@pytest.mark.thorough
def test_the_mirror_keeps_no_secret(mode: str, tmp_path: Path) -> None:
    """auto: a key is there, the server is not."""
    subprocess.run(["git", "init", "-q", "."], check=True)
    subprocess.run(["git", "remote", "add", "origin", f"https://joe:{WORD}@host/x.git"], check=True)
    (tmp_path / "run").mkdir()
    others = set(psutil.Process().children(recursive=True))
    own: set[psutil.Process] = set()
    tracker = Tracker(tmp_path / "run", WandbRun("id", "name", "project", "", [], {}), mode, 0)
    tracker.log({"step": 1, "loss": 1.0})
    log = tmp_path / "run" / "logs" / "wandb.log"

    def is_up() -> bool:
        own.update(set(psutil.Process().children(recursive=True)) - others)
        has_key = "credentials for http://127.0.0.1:9 from" in log.read_text()
        has_begun = has_key if mode == "auto" else any(tmp_path.glob("run/wandb/offline-run-*/*.wandb"))
        return has_begun and len(own) >= 2  # the mirror and wandb's service

    wait_until(is_up)
    tracker.close()
    wait_for_end(own)
    subprocess.run(["git", "remote", "remove", "origin"], check=True)


@pytest.mark.ray
@pytest.mark.thorough
def test_a_run_that_fails_keeps_no_secret(tmp_path: Path) -> None:
    """Its worker is killed, so that it leaves all it can: logs of Ray and of ranks, metrics, wandb's files."""
    words = ["model=rnn", "data=parity", "model.width=8", "data.num_bits=4", "data.global_batch_size=8", "run.name=a"]
    words += [
        "cluster.num_workers=1",
        "cluster.max_failures=0",
        "train.max_steps=1000000",
        "train.log_every=1",
        "checkpoint.every=2",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= SLOW_START | {"WANDB_MODE": "offline"}
    with (tmp_path / "screen").open("w") as screen:
        command = [sys.executable, "-m", "distcond", "train", *words]
        run = psutil.Popen(command, env=environment, stdout=screen, stderr=screen)
    folder, started = tmp_path / "runs" / "a", {run}

    def is_writing() -> bool:
        assert run.poll() is None, (tmp_path / "screen").read_text()
        started.update(run.children(recursive=True))
        return (folder / "checkpoints" / "latest").exists() and any(folder.glob("wandb/offline-run-*/*.wandb"))

    try:
        wait_until(is_writing)
        signal_all(wait_until(lambda: processes_of("RayTrainWorker", run.children(recursive=True))))
        assert run.wait(HANG_S) == 1
        wait_for_end(started)
    finally:
        signal_all(started)
    assert "distcond: failed: worker 0 lost" in (tmp_path / "screen").read_text()
    assert any((folder / "logs" / "ray_session").glob("raylet*"))
