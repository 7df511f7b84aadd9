"""The whole of `distcond train`: a run folder, Ray, one worker per rank, and three closing lines on the screen."""

import os
import shlex
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from distcond.cluster.host import LOOPBACK, data_identity, this_host
from distcond.cluster.initial import check_start
from distcond.cluster.local import preflight, ray_session
from distcond.cluster.notes import passed_on
from distcond.cluster.policy import LESS_MEMORY, LOST, OUT_OF_MEMORY, ask_of, culprits, failure_line, threads_per_worker
from distcond.cluster.progress import Progress, Tail, duration
from distcond.cluster.signals import counted_signals, end_at_once
from distcond.compose import load_config, override, save_config, to_dict
from distcond.config import Config
from distcond.data import absolute_paths, build_task
from distcond.errors import LostError, RunError, TrainingError, UserError
from distcond.train.deepspeed_options import deepspeed_options
from distcond.train.run_folder import RunFolder, check_continues, check_same_data, is_there, parent_of

if TYPE_CHECKING:
    from distcond.cluster.controller import Job

# NOTE: Ray is imported inside the functions, so that what cannot run is refused in less time than its import takes.

POLL_INTERVAL_S = 0.1
RANKS_TIMEOUT_S = 15.0
"How long ranks of a killed command, which end 2 s after it, are waited for."
LOST_RANKS_S = 60.0
"How much longer than cluster.hang_timeout_s ranks on a lost host, which then end themselves, are waited for."
RESTARTS = "restarts.log"
"In the folder of logs: a line for the user at each restart of the workers."


def name_run(config: Config) -> Config:
    """The configuration with absolute folders and a run.name (`<model>-<data>-<yyyymmdd-hhmmss>` where it was empty)."""
    name = config.run.name or f"{config.model.name}-{config.data.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folders = {"run.dir": str(Path(config.run.dir).expanduser().resolve()), "train.init_from": parent_of(config)}
    return override(config, {**folders, "run.name": name})


def ready(config: Config) -> tuple[Config, str]:
    """A configuration for workers, which run in other folders: named, with absolute paths; and a line on where it starts from.

    Raises UserError for what the workers would refuse, before anything is started or written.
    """
    deepspeed_options(config)
    config = name_run(config)
    config = replace(config, data=absolute_paths(config.data))
    return config, "" if config.run.fork else check_start([config])


def check_same(folder: RunFolder, config: Config) -> None:
    """Refuse a folder in which a run with other settings was begun. Raises RunError that names them."""
    if folder.config_file.exists() and folder.is_begun():
        check_continues(load_config(folder.config_file), config, folder.path)


def prepare_run(config: Config) -> Path:
    """Create the run folder of a named configuration, or check that this configuration continues what is in it.

    Raises RunError where another process writes to it, or where it holds a different run.
    """
    if config.run.fork:
        raise RunError("run.fork=true starts one new run by `distcond train`; leave it out here.")
    folder = RunFolder.of(config)
    with folder.locked():
        check_same(folder, config)
        folder.logs.mkdir(exist_ok=True)
        folder.stop_file.unlink(missing_ok=True)
        save_config(config, folder.config_file)
    return folder.path


def fit(
    config: Config, *, wait_for: Callable[[str], None] = lambda what: None, tell: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Train a prepared run on Ray Train workers of the Ray that is already there; returns the summary of rank 0.

    wait_for: told what the run is waiting for. tell: given the lines that rank 0 has for the user.
    Raises the UserError of a worker as it was, and TrainingError, naming the log, for any other failure.
    """
    import ray

    from distcond.cluster.controller import Job, start_controller
    from distcond.cluster.worker import Rank

    folder, ask, here = RunFolder.of(config), ask_of(config.cluster), ray.util.get_node_ip_address()
    started_file, proof_file, proof = folder.logs / "started", folder.logs / "proof", uuid.uuid4().hex
    rank = Rank(
        config=config,
        settings=to_dict(config),
        num_threads=threads_per_worker(ask),
        started_file=started_file,
        proof_file=proof_file,
        proof=proof,
        data=data_identity(config) if here != LOOPBACK else {},  # which nobody else can be at
        head=this_host(here),
    )
    job = Job(
        train=rank.train,
        join=rank.join,
        ask=ask,
        max_failures=config.cluster.max_failures,
        hang_timeout_s=config.cluster.hang_timeout_s,
        wait_for_ranks=partial(folder.wait_for_ranks, config.cluster.hang_timeout_s + LOST_RANKS_S),
        logs=folder.logs,
        started_file=started_file,
        restarts_file=folder.logs / RESTARTS,
        metrics=folder.metrics,
    )
    with folder.locked():
        folder.wait_for_ranks(RANKS_TIMEOUT_S)
        shutil.rmtree(folder.logs / "ray", ignore_errors=True)
        started_file.unlink(missing_ok=True)
        proof_file.write_text(proof)
        wait_for(f"{ask.num_workers} workers")
        controller, outcome = start_controller(job)
        try:
            with passed_on(str(folder.path), tell):
                return _follow(job, folder, outcome, wait_for)
        finally:
            ray.kill(controller)
            for file in (started_file, proof_file):
                file.unlink(missing_ok=True)


def _follow(job: "Job", folder: RunFolder, outcome: Any, wait_for: Callable[[str], None]) -> dict[str, Any]:
    """Wait for the end. A request to stop that comes before training has begun has nothing to save."""
    import ray
    from ray.exceptions import OutOfMemoryError, RayError

    is_training = False
    while not ray.wait([outcome], timeout=POLL_INTERVAL_S)[0]:
        if is_there(job.started_file) != is_training:
            is_training = not is_training
            wait_for("the first figures" if is_training else f"{job.ask.num_workers} workers")
        if not is_training and is_there(folder.stop_file):
            return {**folder.summary(), "stopped": True}
    try:
        end = ray.get(outcome)
    except OutOfMemoryError as error:
        what = "the process that watches the workers: its node is full, so that Ray ended it"
        raise TrainingError(f"{OUT_OF_MEMORY}: {what}; {LESS_MEMORY}; see {folder.logs}.") from error
    except RayError as error:
        raise LostError(f"the process that watches the workers failed; see {folder.logs}.") from error
    if end.last_word is not None:
        raise end.last_word
    if end.error:
        what = failure_line(end.failures) if end.failures else end.error.splitlines()[-1]
        log = f"rank_{culprits(end.failures)[0]}.log" if end.failures else "ray_driver.log"
        is_lost = not end.failures or end.failures[culprits(end.failures)[0]] == LOST
        raise (LostError if is_lost else TrainingError)(f"{what}; see {folder.logs / log}.")
    summary: dict[str, Any] = end.summary
    return summary


def launch(config: Config) -> dict[str, Any]:
    """The whole of `distcond train`; returns the summary.

    One SIGINT or SIGTERM saves a checkpoint and ends in KeyboardInterrupt, a second one ends the process at once.
    Raises UserError for what the user can mend and TrainingError for any other failure.
    """
    start = time.monotonic()
    preflight(config.cluster)
    config, start_line = ready(config)
    task = build_task(config.data)  # prepares a text, or refuses it, before anything is started
    console, is_fork = Console(), config.run.fork
    if is_fork:
        config = _forked(config, console)
    if start_line:
        console.print(start_line, markup=False, highlight=False, soft_wrap=True)
    prepare_run(config)
    folder = RunFolder.of(config)
    if _is_complete(folder, config.train.max_steps):
        console.print(f"All of train.max_steps={config.train.max_steps} are done already.", markup=False, highlight=False)
        summary = folder.summary()
        _show_end(console, folder, summary, config.train.max_steps, time.monotonic() - start)
        return summary
    check_same_data(folder, task.fingerprint())
    has_ray, num_signals, is_asked = threading.Event(), 0, False
    with counted_signals() as count_signals, Progress(console, folder.metrics, config.train.max_steps) as progress:
        run = _in_thread(partial(_run, config, progress.wait_for, progress.note, has_ray))
        restarts = Tail(folder.logs / RESTARTS)
        while not wait([run], POLL_INTERVAL_S).done:
            progress.poll()
            for line in restarts.read():
                progress.note(line)
            num_signals = count_signals()
            if num_signals > (1 if has_ray.is_set() else 0):
                progress.note("Stopped at once.")
                progress.close()
                end_at_once()
            if num_signals and not is_asked:
                is_asked = _ask_to_stop(folder, progress)
    try:
        summary = run.result()
    except UserError:
        if is_fork and not folder.metrics.exists():
            shutil.rmtree(folder.path)  # what cannot be loaded is no run
        raise
    except LostError:
        if not num_signals:
            raise
        # Whoever ended this run ended Ray's processes by the same signal, e.g. systemd or `timeout`.
        summary = {**folder.summary(), "stopped": True}
        console.print("Stopped without a checkpoint, for Ray's processes were ended too.", markup=False, highlight=False)
    _show_end(console, folder, summary, config.train.max_steps, time.monotonic() - start)
    if summary.get("stopped"):
        raise KeyboardInterrupt
    return summary


def _ask_to_stop(folder: RunFolder, progress: Progress) -> bool:
    """Whether the workers can see that they are asked; of storage that does not let them, the next look tries again."""
    try:
        folder.stop_file.touch()
    except OSError:
        return False
    progress.note("Stopping, after this step and a checkpoint; once more stops at once, without them.")
    return True


def _is_complete(folder: RunFolder, max_steps: int) -> bool:
    """Whether the newest checkpoint is intact and of the last step, so that there is nothing to start Ray for."""
    summary = folder.summary()
    if summary.get("stopped", True) or summary.get("step", 0) < max_steps:
        return False
    # NOTE: torch, which reads checkpoints, takes 2 s to import.
    from distcond.train.checkpoint import newest_checkpoint, read_state

    try:
        checkpoint, damaged = newest_checkpoint(folder.checkpoints)
    except RunError:
        return False
    return checkpoint is not None and not damaged and read_state(checkpoint)["step"] >= max_steps


def _show_end(console: Console, folder: RunFolder, summary: Mapping[str, Any], max_steps: int, seconds: float) -> None:
    for line in closing_lines(folder.path, summary, max_steps, seconds):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def closing_lines(path: Path, summary: Mapping[str, Any], max_steps: int, seconds: float) -> list[str]:
    """Where the run is, its best validation figure, the next command to try."""
    shown = os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
    step, best = summary.get("step", 0), summary.get("best")
    figure = f"{best['metric']} {best['value']:.4g} at step {best['step']}" if best else "no validation yet"
    again = f"distcond train --config {shlex.quote(f'{shown}/config.yaml')}"
    return [
        f"run   {shown} (step {step}{f' of {max_steps}' if step <= max_steps else ''}, {duration(seconds)})",
        f"best  {figure}",
        f"next  {again if summary.get('stopped') else f'distcond evaluate {shlex.quote(shown)}'}",
    ]


def check_fork(config: Config) -> str:
    """Refuse, as RunError, a fork that could not start; a line on where it would. config: from `ready`."""
    from distcond.train.fork import find_start

    _check_one_start(config)
    notes: list[str] = []
    state = find_start(config, notes.append)[1]
    return "\n".join([*notes, f"fork  {config.run.name} at step {state['step']} goes on as another run"])


def _check_one_start(config: Config) -> None:
    old = RunFolder.of(config).config_file
    if config.train.init_from and old.is_file() and load_config(old).train.init_from != config.train.init_from:
        raise RunError(
            f"run.fork=true starts from a checkpoint of run.name={config.run.name}, train.init_from={config.train.init_from} "
            "from another; leave one of them out."
        )


def _forked(config: Config, console: Console) -> Config:
    # NOTE: torch, which reads checkpoints, takes 2 s to import; nothing else here needs it.
    from distcond.train.fork import fork_run

    _check_one_start(config)
    show = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    forked, step = fork_run(config, show)
    show(f"fork  {config.run.name} at step {step} goes on as run.name={forked.run.name}")
    return forked


def _run(
    config: Config, wait_for: Callable[[str], None], tell: Callable[[str], None], has_ray: threading.Event
) -> dict[str, Any]:
    wait_for("Ray")
    with ray_session(config.cluster, RunFolder.of(config).logs):
        has_ray.set()
        return fit(config, wait_for=wait_for, tell=tell)


def _in_thread(task: Callable[[], dict[str, Any]]) -> Future[dict[str, Any]]:
    """Run a task beside the main thread, which alone hears signals. The thread does not keep the process alive."""
    future: Future[dict[str, Any]] = Future()

    def run() -> None:
        try:
            future.set_result(task())
        except BaseException as error:  # noqa: BLE001 - raised again by whoever asks for the result
            future.set_exception(error)

    threading.Thread(target=run, name="run", daemon=True).start()
    return future
