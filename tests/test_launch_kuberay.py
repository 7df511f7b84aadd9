import fcntl
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from distcond.cluster import kuberay
from distcond.compose import load_config
from distcond.config import ClusterConfig, ClusterName, Config
from distcond.errors import ClusterError, ConfigError
from tests.cluster.processes import wait_until
from tests.helpers import HANG_S

BIN = Path(sys.executable).parent
CPU = ClusterConfig(name=ClusterName.kuberay, num_workers=2, storage_claim="runs")
GPU = replace(
    CPU, num_workers=4, cpus_per_worker=7.5, gpus_per_worker=1, memory_gib_per_worker=60, env_from="wandb", namespace="research"
)
FOLDER = Path("/home/ray/runs/A run_1")
VARIABLES = {"WANDB_MODE": 'off"line: {}'}


def rendered(cluster: ClusterConfig = CPU, what: str = "train") -> tuple[dict[str, Any], dict[str, Any]]:
    """ConfigMap and RayJob."""
    return tuple(yaml.safe_load_all(kuberay.render(what, Config(cluster=cluster), FOLDER, VARIABLES)))  # type: ignore[return-value]


def pods(job: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    return cluster["headGroupSpec"]["template"]["spec"], cluster["workerGroupSpecs"][0]["template"]["spec"]


# The fields of KubeRay's RayJob that are written, with their types (ray.io/v1: RayJobSpec, RayClusterSpec, and both groups).
RAY_JOB = {
    "submissionMode": str,
    "entrypoint": str,
    "backoffLimit": int,
    "activeDeadlineSeconds": int,
    "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int,
    "rayClusterSpec": {
        "rayVersion": str,
        "authOptions": {"mode": str},
        "headGroupSpec": {"serviceType": str, "rayStartParams": {str: str}, "template": {"spec": dict}},
        "workerGroupSpecs": [
            {
                "groupName": str,
                "replicas": int,
                "minReplicas": int,
                "maxReplicas": int,
                "rayStartParams": {str: str},
                "template": {"spec": dict},
            }
        ],
    },
}


def check(value: Any, schema: Any, place: str = "spec") -> None:
    if isinstance(schema, type):
        assert type(value) is schema, f"{place} is {value!r}, needed is {schema.__name__}"
    elif isinstance(schema, list):
        for number, entry in enumerate(value):
            check(entry, schema[0], f"{place}[{number}]")
    elif str in schema:
        assert all(type(part) is str for pair in value.items() for part in pair), place
    else:
        assert value.keys() == schema.keys(), place
        for key, kind in schema.items():
            check(value[key], kind, f"{place}.{key}")


@pytest.mark.parametrize("cluster", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("what", ["train", "sweep"])
def test_kubernetes_takes_what_is_sent(what: str, cluster: ClusterConfig) -> None:
    import kubernetes_validate

    config_map, job = rendered(cluster, what)
    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(config_map, version, strict=True)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    check(job["spec"], RAY_JOB)
    assert job["spec"]["submissionMode"] in {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"}
    for name, spec in zip(("head", "worker"), pods(job), strict=True):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
        kubernetes_validate.validate(pod, version, strict=True)
    assert job["metadata"] == config_map["metadata"] == {"name": "a-run-1", "namespace": cluster.namespace}


@pytest.mark.thorough
def test_the_job_runs_the_configuration_that_was_composed(tmp_path: Path) -> None:
    config_map, job = rendered(GPU)
    command, flag, file = job["spec"]["entrypoint"].rpartition(" --config ")
    assert command == "python -u -m distcond train"
    assert {"name": "config", "mountPath": str(Path(file).parent), "readOnly": True} in pods(job)[0]["containers"][0][
        "volumeMounts"
    ]
    (tmp_path / "submit.yaml").write_text(config_map["data"][Path(file).name])
    assert load_config(tmp_path / "submit.yaml") == Config(cluster=GPU)
    words = [sys.executable, "-m", "distcond", "train", "--dry-run", flag.strip() or "--config", str(tmp_path / "submit.yaml")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("cluster", [CPU, GPU], ids=["cpu", "gpu"])
def test_pods_have_room_for_what_the_run_asks(cluster: ClusterConfig) -> None:
    _, job = rendered(cluster)
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    asked = pods(job)[1]["containers"][0]["resources"]
    assert asked["requests"] == asked["limits"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == cluster.num_workers
    told = int(group["rayStartParams"]["num-cpus"])
    assert cluster.cpus_per_worker <= told < 2 * cluster.cpus_per_worker  # room for one rank and no second
    assert int(asked["limits"]["cpu"]) == told + 1
    assert int(asked["limits"].get("nvidia.com/gpu", 0)) == cluster.gpus_per_worker
    assert int(asked["limits"]["memory"].removesuffix("Gi")) >= cluster.memory_gib_per_worker + kuberay.SHM_GIB
    assert job["spec"]["activeDeadlineSeconds"] == 4 * 3600


def test_nothing_is_open_to_the_outside_and_nobody_is_root() -> None:
    text = kuberay.render("train", Config(cluster=GPU), FOLDER, VARIABLES)
    assert not {
        word for word in ("NodePort", "LoadBalancer", "hostPort", "hostNetwork", "Ingress", "privileged: true") if word in text
    }
    _, job = rendered(GPU)
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert job["spec"]["rayClusterSpec"]["headGroupSpec"]["serviceType"] == "ClusterIP"
    for spec in pods(job):
        assert spec["securityContext"]["runAsNonRoot"] and not spec["automountServiceAccountToken"]
        container = spec["containers"][0]
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert {"name": "WANDB_MODE", "value": VARIABLES["WANDB_MODE"]} in container["env"]
        assert container["envFrom"] == [{"secretRef": {"name": "wandb"}}]
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts == {"/home/ray/runs", "/etc/distcond", "/dev/shm"}
        assert {"name": "runs", "persistentVolumeClaim": {"claimName": "runs"}} in spec["volumes"]
        assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}} in spec["volumes"]


def test_image_and_ray_are_those_of_the_project() -> None:
    _, job = rendered()
    dockerfile = (Path(__file__).parent.parent / "docker/Dockerfile").read_text()
    assert f"--tag {pods(job)[0]['containers'][0]['image']} ." in dockerfile
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == ray.__version__


@pytest.mark.thorough
def test_a_head_that_has_to_go_has_the_run_saved_first(tmp_path: Path) -> None:
    folder = tmp_path / "it's a run"
    folder.mkdir()
    script = tmp_path / "save.sh"
    script.write_text(f"#!/bin/sh\n{kuberay._save(folder)}\n")
    assert subprocess.run([str(BIN / "shellcheck"), str(script)]).returncode == 0
    _, job = rendered()
    assert pods(job)[0]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"] == ["/bin/sh", "-c", kuberay._save(FOLDER)]
    assert "lifecycle" not in pods(job)[1]["containers"][0]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = subprocess.Popen(["sh", str(script)])
        wait_until((folder / "stop").exists)
        time.sleep(0.5)
        assert process.poll() is None
    assert process.wait(HANG_S) == 0


@pytest.mark.parametrize(
    ("changes", "folder", "message"),
    [
        ({"storage_claim": ""}, FOLDER, "cluster.storage_claim is empty; name a PersistentVolumeClaim"),
        ({"storage_claim": "My claim"}, FOLDER, "cluster.storage_claim='My claim' is no name that Kubernetes takes"),
        ({"namespace": "a: b"}, FOLDER, "cluster.namespace='a: b' is no name"),
        ({"env_from": "x\ny"}, FOLDER, "cluster.env_from="),
        ({"time_limit": "4 hours"}, FOLDER, "cluster.time_limit='4 hours' is not a time"),
        ({}, Path("/runs/___"), "run.name='___' has no letter or digit"),
    ],
)
def test_values_that_kubernetes_cannot_take_are_refused(changes: dict[str, str], folder: Path, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kuberay.render("train", Config(cluster=replace(CPU, **changes)), folder, {})


@pytest.mark.parametrize(
    ("body", "expected"), [('echo "rayjob.ray.io/a created: $*"', "created: apply -f"), ("echo no match >&2; exit 1", "no match")]
)
def test_kubectl_gets_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, expected: str) -> None:
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(f"#!/bin/sh\n{body}\n")
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    if "exit" in body:
        with pytest.raises(ClusterError, match=expected):
            kuberay.hand_to_kubectl(tmp_path / "a.yaml")
    else:
        assert expected in kuberay.hand_to_kubectl(tmp_path / "a.yaml")


def test_without_kubectl_the_manifest_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match=f"kubectl apply -f {tmp_path}/a.yaml"):
        kuberay.hand_to_kubectl(tmp_path / "a.yaml")
