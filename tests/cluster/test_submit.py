import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import pytest

from distcond.cluster.submit import submit
from distcond.compose import compose, load_config, override
from distcond.config import Config
from distcond.errors import ClusterError, ConfigError
from tests.cluster.processes import SLOW_START, TIMEOUT_S, is_alive, signal_all, wait_until

BIN = Path(sys.executable).parent
TOKEN = "0123456789abcdef" * 4


def test_submitting_to_this_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match="cluster=local is this machine"):
        submit("train", Config(), [], dry_run=False)


def test_a_fork_is_not_submitted_for_a_job_that_is_started_again_would_fork_again() -> None:
    config = compose(["cluster=slurm", "run.name=a", "run.fork=true"])
    with pytest.raises(ConfigError, match=r"run.fork=true starts one new run where it is typed"):
        submit("train", config, [], dry_run=True)


def test_a_dry_run_to_ray_shows_the_request_the_files_and_the_configuration(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a-secret")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    overrides = ["cluster=ray", "cluster.address=http://127.0.0.1:1", "run.name=a-run", f"run.dir={tmp_path}", "seed=7"]
    assert submit("train", compose(overrides), overrides, dry_run=True) == 0
    shown = capsys.readouterr().out
    request = json.loads(shown[shown.index("{") : shown.index("\n# package")])
    assert request["address"] == "http://127.0.0.1:1"
    assert request["entrypoint"] == "python -u -m distcond train --config submit.yaml"
    assert request["runtime_env"] == {"env_vars": {"WANDB_MODE": "offline"}}
    assert request["metadata"]["folder"] == f"{tmp_path}/a-run"
    assert "\n  distcond/cluster/jobs.py\n" in shown
    assert "\nseed: 7\n" in shown
    assert "a-secret" not in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("what", "name"), [("train", "run.name=a-name"), ("sweep", "sweep.name=a-name")])
@pytest.mark.thorough
def test_a_dry_run_to_slurm_shows_the_script(
    what: Literal["train", "sweep"], name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    overrides = ["cluster=slurm", "sweep=depth_x_penalty", name, f"run.dir={tmp_path}"]
    assert submit(what, compose(overrides), overrides, dry_run=True) == 0
    shown = capsys.readouterr().out
    assert "#SBATCH --job-name=a-name\n" in shown
    assert f'python -u -m distcond {what} --config "$config"' in shown
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_with_a_bad_space_is_not_sent(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sweep\.space is empty"):
        submit("sweep", compose(["cluster=slurm", f"run.dir={tmp_path}"]), [], dry_run=False)
    assert list(tmp_path.iterdir()) == []


def test_without_sbatch_script_and_configuration_are_left_to_be_submitted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", "")
    config = compose(["cluster=slurm", "run.name=a-run", f"run.dir={tmp_path}", "seed=7"])
    with pytest.raises(ClusterError, match=rf"run: sbatch {tmp_path}/a-run/submit.sbatch"):
        submit("train", config, [], dry_run=False)
    assert f'folder={tmp_path}/a-run\nconfig="$folder/submit.yaml"' in (tmp_path / "a-run/submit.sbatch").read_text()
    assert load_config(tmp_path / "a-run/submit.yaml") == config


# --- a real cluster ---------------------------------------------------------------------------------------------------

SEND = """
import sys
from pathlib import Path
from typing import Literal
from distcond.cluster import jobs, submit
address, entrypoint, package = sys.argv[1:]
client = jobs.connect(address)
identifier = jobs.send(client, jobs.Job(entrypoint, {"env_vars": {"FROM_HERE": "yes"}}, {"note": "test"}), Path(package))
print("sent", identifier, flush=True)
sys.exit(submit.follow_to_end(client, address, identifier))
"""
"What `submit` does once it has a package, for any entrypoint."


@dataclass(frozen=True)
class Cluster:
    address: str
    environment: dict[str, str]

    def start(self, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
        """Python with these arguments, in a process of its own: Ray reads the token once per process."""
        return subprocess.Popen(
            [sys.executable, *arguments],
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        """The same, until it ends."""
        process = self.start(*arguments, **environment)
        try:
            out, err = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A Ray of our own on loopback, with a token, ports and a folder that nobody else uses."""
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port", "metrics-export-port")
    ports = dict(zip(names, _free_ports(len(names)), strict=True))
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
            **SLOW_START,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", f"--temp-dir={folder}"]
        command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--object-store-memory=100000000"]
        command += ["--min-worker-port=0", "--max-worker-port=0", *(f"--{name}={ports[name]}" for name in ports)]
        log = Path(folder) / "head.log"
        with log.open("wb") as output:
            head = subprocess.Popen(command, env=environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
        try:
            address = f"http://127.0.0.1:{ports['dashboard-port']}"
            _wait_for(lambda: "Ray runtime started." in log.read_text() and _answers(address), head, log)
            yield Cluster(address, environment)
        finally:
            _stop(head)


@pytest.mark.ray
def test_a_job_runs_in_its_package_and_its_log_arrives_once_and_whole(cluster: Cluster, tmp_path: Path) -> None:
    lines = "import os; print(open('hello.txt').read(), os.environ['FROM_HERE'], *range(20000), sep='\\n')"
    done = cluster.run("-c", SEND, cluster.address, f'python -c "{lines}"', _package(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    written = done.stdout.splitlines()
    assert written[-20003:-1] == ["hello", "yes", *map(str, range(20000))]
    assert written[-1].endswith(": succeeded")


class Proxy:
    """Passes connections on to a port of this machine, and can cut them all."""

    def __init__(self, port: int) -> None:
        self._to = ("127.0.0.1", port)
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                ends = self._listener.accept()[0], socket.create_connection(self._to)
                self._open += ends
                for source, target in (ends, ends[::-1]):
                    threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> int:
        """Cut what is connected now; returns how many ends that are."""
        cut = 0
        while self._open:
            with contextlib.suppress(OSError), self._open.pop() as end:
                end.shutdown(socket.SHUT_RDWR)
                cut += 1
        return cut

    def close(self) -> None:
        """Take no more connections, and cut those that are open."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()


@pytest.mark.ray
def test_a_log_whose_connection_is_cut_arrives_once_and_whole(cluster: Cluster, tmp_path: Path) -> None:
    proxy = Proxy(int(cluster.address.rpartition(":")[2]))
    is_cut = tmp_path / "cut"  # the job outlives the cuts
    job = f"for i in $(seq 60); do echo line $i; sleep 0.1; [ $i != 45 ] || until [ -e {is_cut} ]; do sleep 0.1; done; done"
    lines = []
    with contextlib.closing(proxy), cluster.start("-c", SEND, proxy.address, job, _package(tmp_path)) as following:
        assert following.stdout is not None and following.stderr is not None
        for line in following.stdout:
            lines.append(line)
            if line in {"line 10\n", "line 30\n", "line 40\n"}:
                wait_until(proxy.cut)  # these lines may have come in one piece, after which nothing is connected yet
            if line == "line 40\n":
                is_cut.touch()
        assert following.wait(TIMEOUT_S) == 0
        assert following.stderr.read() == ""
    assert [line for line in lines if line.startswith("line ")] == [f"line {number}\n" for number in range(1, 61)]


@pytest.mark.ray
def test_a_job_that_fails_is_failure(cluster: Cluster, tmp_path: Path) -> None:
    done = cluster.run("-c", SEND, cluster.address, "echo before; exit 3", _package(tmp_path))
    assert done.returncode == 1
    assert "before" in done.stdout.splitlines()
    assert done.stdout.splitlines()[-1].endswith(": failed")


@pytest.mark.ray
def test_ctrl_c_leaves_the_job_running_and_says_how_to_stop_it(cluster: Cluster, tmp_path: Path) -> None:
    following = cluster.start("-c", SEND, cluster.address, "echo up; sleep 100", _package(tmp_path))
    assert following.stdout is not None
    while following.stdout.readline() != "up\n":
        assert following.poll() is None
    following.send_signal(signal.SIGINT)
    shown, _ = following.communicate(timeout=TIMEOUT_S)
    assert following.returncode == 130
    follow, stop = (line.partition("ray ")[2].split() for line in shown.splitlines()[-2:])
    assert follow[:2] == ["job", "logs"]
    status = cluster.run(str(BIN / "ray"), "job", "status", *stop[2:])
    assert "RUNNING" in status.stdout + status.stderr
    stopped = cluster.run(str(BIN / "ray"), *stop)
    assert "was stopped" in stopped.stdout + stopped.stderr


@pytest.mark.ray
def test_a_run_that_is_sent_trains_there(cluster: Cluster, tmp_path: Path) -> None:
    overrides = ["model=rnn", "data=parity", "model.width=8", "data.num_bits=4", "data.global_batch_size=8"]
    overrides += [f"run.dir={tmp_path}", "run.name=a", "train.max_steps=5", "cluster.num_workers=2"]
    overrides += ["cluster=ray", f"cluster.address={cluster.address}"]
    done = cluster.run("-m", "distcond", "submit", "train", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["step"] == 5
    assert load_config(tmp_path / "a" / "config.yaml") == override(compose(overrides), {"cluster.address": ""})
    assert "(step 5 of 5" in done.stdout  # the run's own closing lines, by way of the job's log


@pytest.mark.ray
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RAY_AUTH_TOKEN": "another"}, "refuses this token"),
        ({"RAY_AUTH_MODE": "disabled"}, "asks for a token; set RAY_AUTH_MODE=token"),
    ],
)
def test_without_the_right_token_nothing_is_sent(cluster: Cluster, environment: dict[str, str], message: str) -> None:
    overrides = ["cluster=ray", f"cluster.address={cluster.address}"]
    done = cluster.run("-m", "distcond", "submit", "train", *overrides, **environment)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def _package(folder: Path) -> str:
    with zipfile.ZipFile(folder / "package.zip", "w") as archive:
        archive.writestr("hello.txt", "hello")
    return str(folder / "package.zip")


def _free_ports(count: int) -> list[int]:
    """Free ports that the system gives to nobody who does not name them, as Ray's own processes do not."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found: list[int] = []
    for port in random.sample(range(first // 2, first), first // 2):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            break
    return found


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=5).close()
    except urllib.error.HTTPError as error:
        error.close()
        return error.code == 401
    except OSError:
        return False
    return True


def _wait_for(condition: Callable[[], bool], head: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert head.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def _stop(head: "subprocess.Popen[bytes]") -> None:
    """End exactly the processes of this head: `ray stop` would end everyone's."""
    processes = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
    head.terminate()  # Ray then ends its own
    head.wait(TIMEOUT_S)
    signal_all(processes)
    wait_until(lambda: not any(map(is_alive, processes)), timeout_s=10)
