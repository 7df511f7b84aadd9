"""A run or sweep as a RayJob of KubeRay: rendered from `launch/rayjob.yaml.j2` and handed to `kubectl`."""

import math
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from distcond.cluster.templates import cores_of_a_node, render_template, seconds
from distcond.compose import to_yaml
from distcond.config import Config
from distcond.errors import ClusterError, ConfigError

TEMPLATE = "rayjob.yaml.j2"
CONFIG_FILE = "submit.yaml"
MANIFEST_FILE = "submit.rayjob.yaml"
GRACE_S = 120
"Seconds between the warning and the end of a pod; a step and a checkpoint must fit in."
HEAD_MEMORY_GIB, SHM_GIB = 8, 2
"Memory of the head, which runs the driver; Ray's object store on each node, for batches in flight."
LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,45}[a-z0-9])?")
"What Kubernetes takes as a name; KubeRay adds to it and allows 63 characters in all."


def render(what: str, config: Config, folder: Path, environment: Mapping[str, str]) -> str:
    """The manifest of `distcond <what>`: a ConfigMap with the resolved configuration, and a RayJob.

    folder: absolute run or sweep folder; its parent is where the storage claim is mounted. environment: of every pod.
    Raises ConfigError for a value that Kubernetes cannot take.
    """
    cluster = config.cluster
    name = re.sub(r"[^a-z0-9-]+", "-", folder.name.lower()).strip("-")[:47].strip("-")
    if not name:
        raise ConfigError(f"run.name={folder.name!r} has no letter or digit that could name a RayJob; use another run.name.")
    if not cluster.storage_claim:
        raise ConfigError(
            "cluster.storage_claim is empty; name a PersistentVolumeClaim (ReadWriteMany) that all pods of the run can mount."
        )
    for key in ("namespace", "storage_claim", "env_from"):
        value = getattr(cluster, key)
        if value and not LABEL.fullmatch(value):
            raise ConfigError(f"cluster.{key}={value!r} is no name that Kubernetes takes; use a-z, 0-9 and -.")
    ray_cpus, cpus = cores_of_a_node(cluster)
    return render_template(
        TEMPLATE,
        what=what,
        name=name,
        namespace=cluster.namespace,
        config_file=CONFIG_FILE,
        config_text=to_yaml(config),
        image=cluster.image,
        environment=environment,
        env_from=cluster.env_from,
        run_dir=str(folder.parent),
        storage_claim=cluster.storage_claim,
        save=_save(folder) if what == "train" else "",
        grace_s=GRACE_S,
        retries=cluster.max_failures,
        deadline_s=seconds(cluster.time_limit),
        ray_version=ray.__version__,
        num_workers=cluster.num_workers,
        # NOTE: every rank has a pod to itself.
        ray_cpus=ray_cpus,
        cpus_per_worker=cpus,
        gpus_per_worker=math.ceil(cluster.gpus_per_worker),
        memory_gib=math.ceil(cluster.memory_gib_per_worker) + SHM_GIB,
        head_memory_gib=HEAD_MEMORY_GIB,
        shm_gib=SHM_GIB,
    )


def _save(folder: Path) -> str:
    """Shell that asks a run for a checkpoint and waits until its driver has let go of the lock of its folder."""
    stop, lock = shlex.quote(f"{folder}/stop"), shlex.quote(f"{folder}/lock")
    return f"touch {stop}; flock -w {GRACE_S - 10} {lock} true"


def hand_to_kubectl(manifest: Path) -> str:
    """Send the manifest; returns what kubectl says. Raises ClusterError where there is no kubectl or it refuses."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        raise ClusterError(
            f"kubectl is not on the PATH of this machine; where it is, run: kubectl apply -f {shlex.quote(str(manifest))}"
        )
    answer: Any = subprocess.run([kubectl, "apply", "-f", str(manifest)], capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise ClusterError(f"kubectl refused {manifest}: {' '.join((answer.stderr or answer.stdout).split())}")
    return " ".join(str(answer.stdout).split())
