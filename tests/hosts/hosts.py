"""Hosts on this machine: each with an address, files and processes of its own, by Linux namespaces. Needs root and iproute2.

A host is one process with namespaces around it: to kill that process is to pull the plug. Nothing outside of them changes,
for the switch that joins the hosts is in a namespace of its own, too. What is left when the tests are killed ends by itself.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

from tests.cluster.processes import TIMEOUT_S

FIRST_PROCESS = "import signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); print(flush=True); sys.stdin.read()"
"Reaps the orphans of its host, and ends, with all of its host, when its standard input does."
NETWORK = "10.77.0"
NET, ALL = ("--net",), ("--net", "--mount", "--uts", "--ipc", "--pid")


def missing() -> str:
    """Why hosts cannot be made here; empty: they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "namespaces need root on Linux"
    for command in (["ip", "-Version"], ["nsenter", "--version"], ["unshare", *ALL, "--fork", "--mount-proc", "true"]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except FileNotFoundError:
            return f"there is no {command[0]}; install iproute2 and util-linux"
        if done.returncode:
            return f"{' '.join(command)}: {done.stderr.strip()}"
    return ""


class Namespaces:
    """Namespaces of these kinds, for as long as their process lives."""

    def __init__(self, kinds: Sequence[str]) -> None:
        command = ["unshare", *kinds, "--fork", "--kill-child", sys.executable, "-S", "-E", "-c", FIRST_PROCESS]
        self._kinds = kinds
        self._outer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert self._outer.stdout is not None and self._outer.stdin is not None
        assert self._outer.stdout.readline(), f"ended: {' '.join(command)}"
        (first,) = psutil.Process(self._outer.pid).children()
        self.pid: int = first.pid

    def command(self, *words: str) -> list[str]:
        """The command that runs `words` inside."""
        return ["nsenter", f"--target={self.pid}", *self._kinds, "--", *words]

    def do(self, *words: str) -> None:
        """Run a command inside, and see that it succeeds."""
        done = subprocess.run(self.command(*words), capture_output=True, text=True, timeout=10)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"

    @property
    def is_up(self) -> bool:
        """Whether it lives."""
        return self._outer.poll() is None

    def processes(self) -> list[psutil.Process]:
        """What runs inside."""
        kind = _inode(self.pid, self._kinds[-1])
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if _inode(process.pid, self._kinds[-1]) == kind:
                    found.append(process)
        return found

    def end(self) -> None:
        """Pull the plug."""
        if self.is_up:
            os.kill(self.pid, signal.SIGKILL)
            self._outer.wait()
        for stream in (self._outer.stdin, self._outer.stdout):
            assert stream is not None
            stream.close()


class Host(Namespaces):
    """A host on the switch; a folder is its own, in which the others see nothing; what is elsewhere is the same on all."""

    def __init__(self, switch: "Switch", number: int, own: Path, environment: Mapping[str, str]) -> None:
        super().__init__(ALL)
        self.name, self.address = f"host{number}", f"{NETWORK}.{number}"
        self._environment = dict(environment)
        self._own = own
        try:
            self._set_up(switch)
        except BaseException:
            self.end()
            raise

    def _set_up(self, switch: "Switch") -> None:
        own = self._own
        self.do("hostname", self.name)
        self.do("mount", "-t", "proc", "proc", "/proc")
        for folder in (own, Path("/dev/shm")):
            self.do("mount", "-t", "tmpfs", "tmpfs", str(folder))
        self.do("mkdir", str(own / "home"), str(own / "tmp"))
        # As Debian has it: the host's own name leads to loopback.
        self.do("sh", "-c", f"echo 127.0.0.1 localhost >{own}/hosts; echo 127.0.1.1 {self.name} >>{own}/hosts")
        self.do("mount", "--bind", str(own / "hosts"), "/etc/hosts")
        self._environment |= {"HOME": str(own / "home"), "TMPDIR": str(own / "tmp"), "RAY_TMPDIR": str(own / "tmp")}
        switch.plug(self)

    def start(self, *words: str, output: IO[bytes] | int | None = None, **environment: str) -> "subprocess.Popen[bytes]":
        """Start a command in the host's own folder. NOTE: it ends with the host, not with the process that is returned."""
        command = self.command("env", f"--chdir={self._own}", *words)
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
        return subprocess.Popen(command, env=self._environment | environment, **streams)

    def run(self, *words: str, timeout_s: float = TIMEOUT_S, **environment: str) -> "subprocess.CompletedProcess[str]":
        """The same, until it ends."""
        command = self.command("env", f"--chdir={self._own}", *words)
        environment = self._environment | environment
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s)


class Switch(Namespaces):
    """What hosts are plugged into."""

    def __init__(self) -> None:
        super().__init__(NET)
        self.do("ip", "link", "add", "switch", "type", "bridge")
        self.do("ip", "link", "set", "switch", "up")

    def plug(self, host: Host) -> None:
        """Give a host its address and its link."""
        # NOTE: the link of a host that has ended goes with its namespace, sooner or later.
        subprocess.run(self.command("ip", "link", "delete", host.name), capture_output=True, timeout=10)
        ends = ["ip", "link", "add", host.name, "netns", str(self.pid), "type", "veth"]
        subprocess.run([*ends, "peer", "name", "eth0", "netns", str(host.pid)], check=True, timeout=10)
        host.do("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            host.do("ip", "link", "set", device, "up")
        self.do("ip", "link", "set", host.name, "master", "switch", "up")

    def set_link(self, host: Host, state: str) -> None:
        """Cut ("down") or restore ("up") the link of a host."""
        self.do("ip", "link", "set", host.name, state)


def _inode(process: int, kind: str) -> int:
    return Path(f"/proc/{process}/ns/{kind.removeprefix('--')}").stat().st_ino
