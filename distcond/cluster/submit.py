"""`distcond submit`: send a run or sweep, as composed here, to a Ray cluster or to Slurm, and return how it ended."""

import json
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Literal

from ray.job_submission import JobStatus, JobSubmissionClient

import distcond
from distcond.cluster import jobs, kuberay, package, slurm
from distcond.cluster.signals import STATUS_INTERRUPTED
from distcond.cluster.sweep import name_sweep, plan
from distcond.cluster.trainer import name_run
from distcond.compose import override, save_config, to_yaml
from distcond.config import ClusterName, Config
from distcond.errors import ConfigError
from distcond.redaction import redact, without_user
from distcond.train.run_folder import RunFolder

FORWARDED_VARIABLES = ("WANDB_MODE", "WANDB_BASE_URL", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
"Settings that follow a job. Never a key or token: a job's environment is shown to everyone who sees the dashboard."


def submit(what: Literal["train", "sweep"], config: Config, overrides: list[str], dry_run: bool) -> int:
    """Send `distcond <what>` to where config.cluster says; returns the exit status: 0 done or queued, 1 failed.

    overrides: what the user typed, kept with the job as a note. dry_run: print exactly what would be sent, no more.
    Raises ConfigError or ClusterError for what cannot be sent.
    """
    if config.cluster.name == ClusterName.local:
        raise ConfigError(f"cluster=local is this machine; use cluster=ray, slurm or kuberay, or `distcond {what}`.")
    if config.run.fork:
        raise ConfigError("run.fork=true starts one new run where it is typed; use distcond train, then submit its run.name.")
    named = name_run(config) if what == "train" else name_sweep(config)
    if what == "sweep":
        plan(named)  # a bad space is told here, not by the cluster
    if config.cluster.name == ClusterName.ray:
        return _submit_to_ray(what, named, overrides, dry_run)
    if config.cluster.name == ClusterName.slurm:
        return _submit_to_slurm(what, named, dry_run)
    assert config.cluster.name == ClusterName.kuberay
    return _submit_to_kuberay(what, named, dry_run)


def result_folder(what: str, config: Config) -> Path:
    """Absolute folder of a named run or sweep."""
    return Path(config.run.dir) / (config.run.name if what == "train" else config.sweep.name)


def make_job(what: str, config: Config, overrides: list[str]) -> jobs.Job:
    """The job that runs `distcond <what>` inside a package whose root holds the resolved configuration."""
    return jobs.Job(
        entrypoint=f"python -u -m distcond {what} --config {package.CONFIG_FILE}",
        runtime_env={"env_vars": forwarded_variables()},
        metadata={
            "distcond": distcond.__version__,
            "folder": str(result_folder(what, config)),
            "overrides": shlex.join(overrides),
        },
    )


def forwarded_variables() -> dict[str, str]:
    """What of this environment goes along."""
    return {name: without_user(os.environ[name]) for name in FORWARDED_VARIABLES if name in os.environ}


def _submit_to_ray(what: str, config: Config, overrides: list[str], dry_run: bool) -> int:
    address = jobs.find_address(config.cluster.address, os.environ)
    # The address is the dashboard's; inside the cluster, Ray tells the job where it is.
    sent = override(config, {"cluster.address": ""})
    contents = package.list_contents(package.find_checkout())
    job = make_job(what, sent, overrides)
    if dry_run:
        _say(_describe(address, job, contents, sent))
        return 0
    client = jobs.connect(address)
    with tempfile.TemporaryDirectory(prefix="distcond-") as folder:
        identifier = jobs.send(client, job, package.write_package(contents, sent, Path(folder)))
    _say(f"Sent to {address} as job {identifier}; folder on the cluster: {result_folder(what, sent)}")
    return follow_to_end(client, address, identifier)


def follow_to_end(client: JobSubmissionClient, address: str, identifier: str) -> int:
    """Show what a job writes until it ends, or until Ctrl-C, which leaves it running; returns the exit status."""
    try:
        status = jobs.follow(client, identifier, _write)
    except KeyboardInterrupt:
        _say("No longer following; the job goes on.")
        _say(f"Follow it: ray job logs --address {address} --follow {identifier}")
        _say(f"Stop it:   ray job stop --address {address} {identifier}")
        return STATUS_INTERRUPTED
    _say(f"Job {identifier}: {status.lower()}")
    return 0 if status == JobStatus.SUCCEEDED else 1


def _say(line: str) -> None:
    _write(f"{redact(line)}\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _describe(address: str, job: jobs.Job, contents: package.Contents, config: Config) -> str:
    """What a dry run shows: the request, the files and the configuration."""
    source = "the configuration alone; distcond must be installed there"
    if contents.root is not None:
        source = f"{contents.root}: {len(contents.files)} files, {contents.num_bytes / 2**20:.1f} MiB"
    request = json.dumps({"address": address, **job.to_dict()}, indent=2)
    files = "\n".join(f"  {file}" for file in contents.files)
    return f"# job\n{request}\n# package: {source}\n{files}\n# {package.CONFIG_FILE}\n{to_yaml(config)}"


def _submit_to_slurm(what: str, config: Config, dry_run: bool) -> int:
    folder = result_folder(what, config)
    script = slurm.render(what, config, folder)
    if dry_run:
        _write(script)
        return 0
    RunFolder(folder).check_writable()
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    save_config(override(config, {"cluster.address": ""}), folder / slurm.CONFIG_FILE)
    file = folder / slurm.SCRIPT_FILE
    file.write_text(script, encoding="utf-8")
    _say(f"{file}: {slurm.hand_to_sbatch(file)}")
    return 0


def _submit_to_kuberay(what: str, config: Config, dry_run: bool) -> int:
    # Inside the cluster, Ray tells the job where it is.
    sent = override(config, {"cluster.address": ""})
    manifest = kuberay.render(what, sent, result_folder(what, config), forwarded_variables())
    if dry_run:
        _write(manifest)
        return 0
    file = Path(f"{result_folder(what, config).name}.{kuberay.MANIFEST_FILE}").resolve()
    file.write_text(manifest, encoding="utf-8")
    _say(f"{file}: {kuberay.hand_to_kubectl(file)}")
    return 0
