import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distcond.cluster import slurm
from distcond.config import ClusterConfig, Config
from distcond.errors import ClusterError, ConfigError
from tests.cluster.processes import wait_until
from tests.helpers import HANG_S

BIN = Path(sys.executable).parent

CONFIGS = {
    "cpu": ClusterConfig(num_workers=2),
    "gpu": ClusterConfig(num_workers=4, cpus_per_worker=7.5, gpus_per_worker=1, partition="big-gpus", time_limit="2-00:30:00"),
}


@pytest.fixture(params=CONFIGS)
def cluster(request: pytest.FixtureRequest) -> ClusterConfig:
    return CONFIGS[request.param]


@pytest.mark.parametrize("what", ["train", "sweep"])
def test_script_has_no_lint(what: str, cluster: ClusterConfig, tmp_path: Path) -> None:
    script = tmp_path / "submit.sbatch"
    script.write_text(slurm.render(what, Config(cluster=cluster), tmp_path / "a-run"))
    for command in (["bash", "-n"], [str(BIN / "shellcheck"), "--color=never"]):
        found = subprocess.run([*command, str(script)], capture_output=True, text=True)
        assert found.returncode == 0, found.stdout + found.stderr


def test_script_asks_for_what_the_config_says(tmp_path: Path) -> None:
    directives = _directives(slurm.render("train", Config(cluster=CONFIGS["gpu"]), tmp_path / "a-run"))
    assert directives["nodes"] == "4"
    assert directives["cpus-per-task"] == "9"  # 7.5 of the rank, rounded up, and one for its data actor
    assert directives["gpus-per-node"] == "1"
    assert directives["partition"] == "big-gpus"
    assert directives["time"] == "2-00:30:00"
    assert directives["job-name"] == "a-run"


def test_script_leaves_out_what_the_config_leaves_out(tmp_path: Path) -> None:
    directives = _directives(slurm.render("train", Config(cluster=CONFIGS["cpu"]), tmp_path / "a-run"))
    assert not directives.keys() & {"partition", "gpus-per-node"}


@pytest.mark.parametrize(
    ("cluster", "folder", "message"),
    [
        (ClusterConfig(time_limit="4 hours"), "/runs/a", "cluster.time_limit='4 hours' is not a time"),
        (ClusterConfig(partition="a\n#SBATCH --account=b"), "/runs/a", "cluster.partition is"),
        (ClusterConfig(cpus_per_worker=0.5), "/runs/a", "cluster.cpus_per_worker=0.5: two ranks would share a node"),
        (ClusterConfig(), "/my runs/a", "the run folder is '/my runs/a'"),
        (ClusterConfig(), "/runs/%j", "the run folder is '/runs/%j'"),
    ],
)
def test_values_that_slurm_cannot_take_are_refused(cluster: ClusterConfig, folder: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        slurm.render("train", Config(cluster=cluster), Path(folder))


def test_a_finished_run_is_success(job: "FakeJob") -> None:
    assert job.start('touch "$RESULT"').wait(HANG_S) == 0
    called = job.calls()
    assert called[0].startswith("ray symmetric-run --address node7:6379 --min-nodes 2 --num-cpus=1 --num-gpus=0")
    assert called[0].endswith(f"-- env RAY_ADDRESS=node7:6379 python -u -m distcond train --config {job.folder}/submit.yaml")
    assert called[1:] == ["token 64"]


def test_the_exit_status_of_a_failed_run_is_passed_on(job: "FakeJob") -> None:
    assert job.start('touch "$RESULT"; exit 7').wait(HANG_S) == 7


def test_a_ray_that_did_not_start_is_failure_though_it_exits_0(job: "FakeJob") -> None:
    job.result.touch()
    time.sleep(0.05)
    assert job.start("true").wait(HANG_S) == 1


@pytest.mark.thorough
def test_out_of_time_saves_and_queues_the_job_again(job: "FakeJob") -> None:
    process = job.start('until [[ -e "$STOP" ]]; do sleep 0.05; done; sleep 0.3; touch "$RESULT"; exit 130')
    wait_until(lambda: len(job.calls()) == 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(HANG_S) == 0
    assert job.calls()[2:] == ["scontrol requeue 42"]


@pytest.mark.parametrize(
    ("end", "status"),
    [
        pytest.param('touch "$RESULT"', 0, id="finished in time after all"),
        pytest.param("exit 3", 3, id="failed while saving"),
        pytest.param("exit 130", 1, id="had nothing to save"),
    ],
)
def test_out_of_time_without_a_saved_run_does_not_queue_again(end: str, status: int, job: "FakeJob") -> None:
    process = job.start(f'until [[ -e "$STOP" ]]; do sleep 0.05; done; {end}')
    wait_until(lambda: len(job.calls()) == 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(HANG_S) == status
    assert len(job.calls()) == 2


def test_sbatch_gets_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _executable(tmp_path / "sbatch", 'echo "Submitted batch job 42: $1"')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert slurm.hand_to_sbatch(tmp_path / "submit.sbatch") == f"Submitted batch job 42: {tmp_path}/submit.sbatch"


def test_the_answer_of_an_sbatch_that_refuses_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _executable(tmp_path / "sbatch", "echo 'sbatch: error: invalid partition' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ClusterError, match="invalid partition"):
        slurm.hand_to_sbatch(tmp_path / "submit.sbatch")


def test_without_sbatch_the_script_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match=rf"run: sbatch {tmp_path}/submit.sbatch"):
        slurm.hand_to_sbatch(tmp_path / "submit.sbatch")


class FakeJob:
    """A rendered script where srun runs in place, and ray and scontrol only write down how they were called."""

    def __init__(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "a-run"
        self.result = self.folder / "summary.json"
        self._bin = tmp_path / "bin"
        self._calls = tmp_path / "calls"
        self._script = tmp_path / "submit.sbatch"
        self._bin.mkdir()
        (self.folder / "logs").mkdir(parents=True)
        _executable(self._bin / "srun", 'while [[ "$1" == --* ]]; do shift; done; exec "$@"')
        _executable(
            self._bin / "scontrol",
            f'if [[ "$1" == show ]]; then echo node7; echo node8; else echo "scontrol $*" >> {self._calls}; fi',
        )

    def start(self, run: str) -> subprocess.Popen[bytes]:
        """Start the script; `run` is bash that stands for the whole of Ray and the run."""
        body = f'echo "ray $*" >> {self._calls}; echo "token ${{#RAY_AUTH_TOKEN}}" >> {self._calls}\nsleep 0.05\n{run}'
        _executable(self._bin / "ray", body)  # sleeps, for time stamps of files have ticks of up to 10 ms
        text = slurm.render("train", Config(cluster=CONFIGS["cpu"]), self.folder)
        # The script puts the submitting environment first, and with it the real `ray`; here the stubs are first.
        line = f"export PATH={BIN}:"
        assert line in text
        self._script.write_text(text.replace(line, f"export PATH={self._bin}:{BIN}:"))
        environment = os.environ | {
            "SLURM_JOB_ID": "42",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_JOB_NUM_NODES": "2",
            "RESULT": str(self.result),
            "STOP": str(self.folder / "stop"),
        }
        environment.pop("RAY_AUTH_TOKEN", None)
        return subprocess.Popen(["bash", str(self._script)], env=environment, stdout=subprocess.DEVNULL)

    def calls(self) -> list[str]:
        """The commands that were called, and the length of the token they saw."""
        return self._calls.read_text().splitlines() if self._calls.exists() else []


@pytest.fixture
def job(tmp_path: Path) -> FakeJob:
    return FakeJob(tmp_path)


def _directives(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH --")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def _executable(file: Path, body: str) -> None:
    file.write_text(f"#!/bin/bash\n{body}\n")
    file.chmod(0o755)
