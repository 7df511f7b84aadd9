"""A run or sweep as a Slurm batch script: rendered from `launch/slurm.sbatch.j2` and handed to `sbatch`."""

import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from distcond.cluster.templates import cores_of_a_node, render_template, seconds
from distcond.config import Config
from distcond.errors import ClusterError, ConfigError

TEMPLATE = "slurm.sbatch.j2"
CONFIG_FILE = "submit.yaml"
SCRIPT_FILE = "submit.sbatch"
RESULT_FILES = {"train": "summary.json", "sweep": "sweep.json"}
"What a finished command leaves in its folder."
GRACE_S = 120
"Seconds before the time limit at which a run is asked to save; a step and a checkpoint must fit in."
PLAIN = re.compile(r"[\w./@+=:,-]*")
"What may stand in an #SBATCH line, where nothing can be quoted and % is a pattern of Slurm's own."


def render(what: str, config: Config, folder: Path) -> str:
    """The batch script of `distcond <what>`.

    folder: absolute run or sweep folder, which holds `CONFIG_FILE` when the job starts.
    Raises ConfigError for a value that Slurm cannot take.
    """
    cluster = config.cluster
    seconds(cluster.time_limit)
    ray_cpus, cpus = cores_of_a_node(cluster)
    working_dir = Path.cwd()
    for key, value in {
        "the run folder": str(folder),
        "cluster.partition": cluster.partition,
        "the current folder": str(working_dir),
    }.items():
        if not PLAIN.fullmatch(value):
            raise ConfigError(f"{key} is {value!r}; Slurm takes letters, digits and ./@+=:,-_ alone there.")
    return render_template(
        TEMPLATE,
        what=what,
        name=folder.name,
        folder=folder,
        config_file=CONFIG_FILE,
        result_file=RESULT_FILES[what],
        working_dir=working_dir,
        python_bin=Path(sys.executable).parent,
        partition=cluster.partition,
        time_limit=cluster.time_limit,
        grace_s=GRACE_S,
        # NOTE: every rank has a node to itself.
        num_nodes=cluster.num_workers,
        ray_cpus=ray_cpus,
        cpus_per_node=cpus,
        gpus_per_node=math.ceil(cluster.gpus_per_worker),
    )


def hand_to_sbatch(script: Path) -> str:
    """Queue the script; returns what sbatch says. Raises ClusterError where there is no sbatch or it refuses."""
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise ClusterError(
            f"sbatch is not on the PATH of this machine; on a Slurm login node run: sbatch {shlex.quote(str(script))}"
        )
    answer = subprocess.run([sbatch, str(script)], capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        reason = " ".join((answer.stderr or answer.stdout).split())
        raise ClusterError(f"sbatch refused {script}: {reason}")
    return answer.stdout.strip()
