"""The batch script of Slurm on two hosts, with a real `ray symmetric-run`; only Slurm's own commands are stand-ins."""

import json
import shlex
import subprocess
import time
from pathlib import Path

import pytest

from distcond.command_line import overrides_of
from tests.cluster.processes import assert_same_end, last_step, wait_until
from tests.helpers import changed
from tests.hosts.conftest import Cluster
from tests.hosts.hosts import Host
from tests.hosts.test_hosts import DISTCOND, hosts_of, text_on, undisturbed

pytestmark = pytest.mark.hosts

COMMANDS = {
    # NOTE: addresses, because `ray symmetric-run` looks the first one up to see on which host it is.
    "scontrol": '[[ "$1" == show ]] && printf "%s\\n" {first.address} {second.address} || echo "$*" >>{folder}/calls',
    "sbatch": "echo Submitted batch job 42",
    # Runs its command here, and leaves it with its environment for the other host, as srun does.
    "srun": 'while [[ "$1" == --* ]]; do shift; done\n'
    "{{ export -p; printf 'exec'; printf ' %q' \"$@\"; }} >{folder}/step.new; mv {folder}/step.new {folder}/step\n"
    'exec "$@"',
}
OTHER_HOST = "until [[ -e {folder}/step ]]; do sleep 0.1; done; sleep 1; . {folder}/step"


class Job:
    """A batch job on two hosts."""

    def __init__(self, folder: Path, script: Path, hosts: tuple[Host, Host]) -> None:
        self.folder, self.script, self.hosts = folder, script, hosts
        first, second = hosts
        for name, body in COMMANDS.items():
            (folder / name).write_text(f"#!/bin/bash\n{body.format(first=first, second=second, folder=folder)}\n")
            (folder / name).chmod(0o755)

    def start(self) -> "subprocess.Popen[bytes]":
        """What Slurm does when it is the job's turn."""
        (self.folder / "step").unlink(missing_ok=True)
        first, second = self.hosts
        with (self.folder / "log").open("ab") as log:
            self._other = second.start("bash", "-c", OTHER_HOST.format(folder=self.folder), output=log)
            environment = {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "host[5-6]", "SLURM_JOB_NUM_NODES": "2"}
            return first.start("env", f"PATH={self.folder}:/usr/bin:/bin", "bash", str(self.script), output=log, **environment)

    def end(self, process: "subprocess.Popen[bytes]", timeout_s: float) -> None:
        """See that it succeeds, and wait for the other host as srun does."""
        assert process.wait(timeout_s) == 0, self.log()
        start = time.monotonic()
        self._other.wait(45)
        print(f"the other host ended {time.monotonic() - start:.1f} s after the first")

    def warn(self) -> None:
        """What Slurm sends to the batch script alone, some time before the end."""
        self.hosts[0].do("pkill", "-TERM", "-o", "-f", f"^bash {self.script}")

    def log(self) -> str:
        return (self.folder / "log").read_text()


@pytest.mark.slow
def test_a_job_out_of_time_is_queued_again_and_ends_as_if_it_had_had_the_time(cluster: Cluster, tmp_path: Path) -> None:
    config = text_on(cluster.shared, run__name="slurm", train__max_steps=150, train__eval_every=50)
    run, folder = cluster.shared / "slurm", cluster.shared / "bin"
    folder.mkdir()
    hosts = cluster.add_host(5), cluster.add_host(6)
    job = Job(folder, run / "submit.sbatch", hosts)
    words = shlex.join([*DISTCOND, "submit", "train", *overrides_of(changed(config, cluster__name="slurm"))])
    done = hosts[0].run("bash", "-c", f'PATH="$PATH:{folder}"; {words}')
    assert (done.returncode, done.stderr) == (0, "")
    assert "Submitted batch job 42" in done.stdout

    process = job.start()
    wait_until(lambda: last_step(run) >= 12 or process.poll() is not None)
    assert process.poll() is None, job.log()
    job.warn()
    job.end(process, 60)
    assert (folder / "calls").read_text() == "requeue 42\n"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["stopped"] and 12 <= summary["step"] < 150
    assert hosts_of(run) == [host.name for host in hosts]

    job.end(job.start(), 120)
    assert (folder / "calls").read_text() == "requeue 42\n"
    assert f"from step {summary['step']}" in (run / "logs" / "rank_0.log").read_text()
    assert_same_end(run, undisturbed(config, tmp_path))
