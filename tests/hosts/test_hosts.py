"""Runs on a cluster of two hosts, which share one folder and nothing else, and whose link or power may fail."""

import json
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from distcond.command_line import overrides_of
from distcond.config import Config
from tests.cluster.processes import TIMEOUT_S, assert_same_end, last_step, processes_of, tensors_of, wait_until
from tests.helpers import changed, text_config, train_run
from tests.hosts.conftest import Cluster
from tests.hosts.hosts import Host

pytestmark = pytest.mark.hosts

DISTCOND = ("python", "-u", "-m", "distcond")
NUM_STEPS = 150
HANG_TIMEOUT_S = 15.0

LIST_ACTORS = """
import json
from ray.util.state import list_actors
print(json.dumps([[actor.class_name, actor.node_id] for actor in list_actors(detail=True, limit=1000)]))
"""


def text_on(shared: Path, **changes: Any) -> Config:
    """A sharded run on text that all hosts see and each prepares for itself."""
    base = {"model__tree__depth": 4, "data__cache_dir": "~/corpora", "cluster__hang_timeout_s": HANG_TIMEOUT_S}
    base |= {"train__max_steps": 40, "train__eval_every": 20, "checkpoint__every": 10}
    return text_config(shared, **{**base, **changes})


def undisturbed(config: Config, folder: Path) -> Path:
    """The folder of the same run on two ranks of one host, without Ray."""
    train_run(changed(config, run__dir=str(folder), data__cache_dir=str(folder / "corpora")))
    return folder / config.run.name


@pytest.fixture(scope="module")
def long_run(session_cluster: Cluster) -> Config:
    """A run that lasts long enough to be disturbed."""
    return text_on(session_cluster.shared, train__max_steps=NUM_STEPS, train__eval_every=50)


@pytest.fixture(scope="module")
def end(long_run: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run, undisturbed."""
    return undisturbed(long_run, tmp_path_factory.mktemp("undisturbed"))


@contextmanager
def training(cluster: Cluster, config: Config, log: Path) -> "Iterator[subprocess.Popen[bytes]]":
    """`distcond train` on the head, as a job would start it."""
    words = overrides_of(changed(config, cluster__address=f"{cluster.head.address}:6379"))
    with log.open("wb") as output:
        process = cluster.head.start(*DISTCOND, "train", *words, output=output)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def submit(cluster: Cluster, config: Config, **environment: str) -> "subprocess.CompletedProcess[str]":
    words = overrides_of(changed(config, cluster__address=cluster.dashboard, cluster__name="ray"))
    return cluster.laptop.run(*DISTCOND, "submit", "train", *words, **environment)


def test_a_run_that_is_sent_from_elsewhere_trains_on_both_hosts_as_on_one(cluster: Cluster, tmp_path: Path) -> None:
    config = text_on(cluster.shared)
    done = submit(cluster, config)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "(step 40 of 40" in done.stdout
    run = cluster.shared / "run"
    assert hosts_of(run) == [cluster.head.name, cluster.node.name]
    actors = json.loads(cluster.head.run("python", "-c", LIST_ACTORS, RAY_ADDRESS=f"{cluster.head.address}:6379").stdout)
    places = {name: sorted(node for actor, node in actors if actor == name) for name in ("RayTrainWorker", "_DataActor")}
    assert len(set(places["RayTrainWorker"])) == 2
    assert places["_DataActor"] == places["RayTrainWorker"]  # each beside its worker
    rows = {name: value for name, value in tensors_of(run).items() if name.startswith("tables_")}
    assert {name.split("_of_")[0] for name, value in rows.items() if value.size} == {"tables_00000", "tables_00001"}
    assert_same_end(run, undisturbed(config, tmp_path))


def test_who_has_another_token_or_is_no_node_is_refused_in_a_line(cluster: Cluster) -> None:
    config = text_on(cluster.shared, run__name="never")
    for done, message in (
        (submit(cluster, config, RAY_AUTH_TOKEN="another"), f"{cluster.dashboard} refuses this token"),
        (
            cluster.node.run(*DISTCOND, "train", f"cluster.address={cluster.head.address}:6379", RAY_AUTH_TOKEN="another"),
            f"the Ray cluster at {cluster.head.address}:6379 wants a token, and not the one that was given",
        ),
        (
            cluster.laptop.run(*DISTCOND, "train", f"cluster.address={cluster.head.address}:6379"),
            f"this machine is no node of the Ray cluster at {cluster.head.address}:6379",
        ),
    ):
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_run_folder_that_is_not_shared_is_told_before_training(cluster: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with training(cluster, text_on(cluster.shared, run__dir=str(cluster.own / "runs")), log) as process:
        assert process.wait(TIMEOUT_S) == 2
    line = (
        rf"distcond: error: run\.dir={cluster.own}/runs is not on storage that all hosts share: {name(cluster.node)} does not "
        rf"see what {name(cluster.head)} has written there; set run\.dir to a folder that every host of the cluster mounts\."
    )
    shown = log.read_text()
    assert len(re.findall(f"^{line}$", shown, re.MULTILINE)) == 1
    assert "the first figures" not in shown
    assert "Restarting" not in shown


@pytest.mark.slow
@pytest.mark.parametrize("has_other", [False, True], ids=["no files", "other files"])
def test_a_host_without_the_data_of_the_others_is_named(has_other: bool, cluster: Cluster, tmp_path: Path) -> None:
    own = cluster.own / "corpus"
    config = text_on(cluster.shared, run__name=f"data-{has_other}", data__files=[f"{own}/*.txt"])
    for host in (cluster.head, cluster.node):
        host.do("rm", "-rf", str(own))
    cluster.head.do("cp", "-r", str(cluster.shared / "corpus"), str(own))
    if has_other:
        cluster.node.do("cp", "-r", str(cluster.shared / "corpus"), str(own))
        cluster.node.do("cp", f"{own}/1.txt", f"{own}/2.txt")
    log = tmp_path / "log"
    with training(cluster, config, log) as process:
        assert process.wait(TIMEOUT_S) == 2
    what = (
        rf"has other data=text than {name(cluster.head)}; put them on storage that all hosts share, or the same on each of them\."
        if has_other
        else r"data\.files: '\S+' matches no file .*; put them on storage that all hosts share, or on each of them\."
    )
    assert len(re.findall(rf"^distcond: error: {name(cluster.node)}:? {what}$", log.read_text(), re.MULTILINE)) == 1


def reaches(run: Path, step: int, process: "subprocess.Popen[bytes]", log: Path) -> bool:
    assert process.poll() is None, log.read_text()
    return last_step(run) >= step


def says(log: Path, process: "subprocess.Popen[bytes]", text: str) -> bool:
    assert process.poll() is None, log.read_text()
    return text in log.read_text()


def hosts_of(run: Path) -> list[str]:
    """Names of the hosts of the ranks that write the run, or wrote it last."""
    return sorted(re.findall(r"process \d+ on (\w+)", (run / "logs" / "ranks").read_text()))


RESTART = re.compile(
    r"^Restarting: worker \d(, \d)? (lost|stood still.*|did not answer) \(failure 1 of 3 allowed\)\.$", re.MULTILINE
)


@pytest.mark.slow
def test_a_host_that_loses_its_power_is_waited_for(long_run: Config, cluster: Cluster, tmp_path: Path, end: Path) -> None:
    config, log = changed(long_run, run__name="power"), tmp_path / "log"
    run, times = cluster.shared / "power", []
    with training(cluster, config, log) as process:
        wait_until(lambda: reaches(run, 15, process, log))
        cluster.switch.set_link(cluster.node, "down")  # so that nobody is told
        cluster.node.end()
        times.append(time.monotonic())
        wait_until(lambda: says(log, process, "Waiting: cluster.num_workers=2 x 1 CPU asks for 2 CPUs; the cluster has 1.\n"))
        times.append(time.monotonic())
        assert RESTART.search(log.read_text()), log.read_text()
        step = last_step(run)
        cluster.node = cluster.add_node(2)
        times.append(time.monotonic())
        wait_until(lambda: reaches(run, step + 1, process, log))
        times.append(time.monotonic())
        assert process.wait(TIMEOUT_S) == 0, log.read_text()
    told(times, "noticed", "back", "further than before")
    assert_same_end(run, end)


@pytest.mark.slow
def test_a_link_that_is_cut_costs_a_moment_or_a_restart_on_other_hosts(
    long_run: Config, cluster: Cluster, tmp_path: Path, end: Path
) -> None:
    config, log = changed(long_run, run__name="link"), tmp_path / "log"
    run, times = cluster.shared / "link", []
    nodes = {host.name: host for host in (cluster.node, cluster.add_node(3))}
    with training(cluster, config, log) as process:
        wait_until(lambda: reaches(run, 15, process, log))
        cut = nodes[hosts_of(run)[-1]]
        cluster.switch.set_link(cut, "down")
        time.sleep(3)
        step = last_step(run)
        cluster.switch.set_link(cut, "up")
        wait_until(lambda: reaches(run, step + 2, process, log))
        assert "Restarting" not in log.read_text()

        cluster.switch.set_link(cut, "down")
        times.append(time.monotonic())
        step = last_step(run)
        assert processes_of("RayTrainWorker", cut.processes())
        wait_until(lambda: RESTART.search(log.read_text()))
        times.append(time.monotonic())
        wait_until(lambda: not processes_of("RayTrainWorker", cut.processes()))  # it ends itself, for it would go on writing
        times.append(time.monotonic())
        assert times[-1] - times[0] < HANG_TIMEOUT_S + 25  # left alone it waits for the others for minutes
        wait_until(lambda: reaches(run, step + 1, process, log))
        times.append(time.monotonic())
        assert cut.name not in hosts_of(run)
        cluster.switch.set_link(cut, "up")
        assert process.wait(TIMEOUT_S) == 0, log.read_text()
    told(times, "noticed", "isolated rank ended", "further than before")
    assert_same_end(run, end)
    cut.end()
    cluster.node = next(host for host in nodes.values() if host is not cut)


def name(host: Host) -> str:
    """As lines for the user have it, as a pattern."""
    return re.escape(f"{host.name} ({host.address})")


def told(times: list[float], *names: str) -> None:
    spans = (f"{name} after {end - start:.1f} s" for name, start, end in zip(names, times, times[1:], strict=False))
    print(", ".join(spans))
