"""Ray Train's controller with the parts that a run needs and none of the others.

Ray Train v2 starts, restarts and watches the workers. `TorchTrainer.fit` would do the same around it, but also start a
process each for Ray Data, the autoscaler and the clean-up of placement groups, import torch in two processes that never
use it, and give its processes an environment of their own, so that none of those that Ray keeps ready fits: from the
end of Ray's start to the first line of the training function 13 to 17 s, and 7 s this way (two ranks on two busy cores).

NOTE: `ray.train.v2._internal` is the price; it is why pyproject.toml pins Ray to one minor release.
"""

import asyncio
import os
import time
import uuid
from collections.abc import Mapping
from typing import Any

import ray.train
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.accelerators import AcceleratorSetupCallback
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.controller.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2._internal.util import ObjectRefWrapper
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from distcond.cluster.controller import Job, Outcome
from distcond.cluster.memory import NoMemoryError, kernel_kills
from distcond.cluster.policy import LOST, OUT_OF_MEMORY, SILENT, Room, restart_line, should_restart, waiting_line
from distcond.cluster.pulse import StuckError
from distcond.errors import TrainingError, UserError
from distcond.redaction import redact

ENVIRONMENT = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
"Seconds between looks at the workers (Ray: 2), which is how soon an end, an error or a lost worker is noticed."

ROOM_POLL_S = 1.0


def run_workers(job: Job) -> Outcome:
    """Run the job's functions on its workers until they have returned or there is no point in another attempt."""
    # NOTE: what Ray Train finds here when it starts workers, it would make an environment of their own.
    os.environ.update(ENVIRONMENT)
    restarts = _Restarts(job)
    try:
        controller = TrainController(**_parts(job, restarts))
    finally:
        for name in ENVIRONMENT:
            del os.environ[name]
    asyncio.run(controller.run())
    result = controller.get_result()
    if result.error is None:
        return Outcome(summary=result.return_value)
    return Outcome(last_word=_last_word(result.error), failures=restarts.failures(result.error), error=str(result.error))


def _parts(job: Job, restarts: FailurePolicy) -> dict[str, Any]:
    scaling = ScalingConfig(
        num_workers=job.ask.num_workers, resources_per_worker=job.ask.bundle, use_gpu=job.ask.gpus_per_worker > 0
    )
    context = TrainRunContext(
        run_config=RunConfig(name="train", storage_path=str(job.logs / "ray"), failure_config=restarts.failure_config),
        train_loop_config=None,
        scaling_config=scaling,
        backend_config=BackendConfig(),
        dataset_config=ray.train.DataConfig(),
    )
    return {
        "train_fn_ref": ObjectRefWrapper(job.train),
        "train_run_context": context,
        "scaling_policy": _FixedSize(scaling, job),
        "failure_policy": restarts,
        "callbacks": [AcceleratorSetupCallback(_SharedGpus(), scaling), _Group(job)],
    }


class _SharedGpus(BackendConfig):  # type: ignore[misc]  # Ray is untyped
    """Workers of one node see one another's GPUs; a worker's own is number LOCAL_RANK."""

    @property
    def backend_cls(self) -> type:
        return _SharedGpusBackend


class _SharedGpusBackend(Backend):  # type: ignore[misc]  # Ray is untyped
    share_cuda_visible_devices = True


class _Group(WorkerGroupCallback):  # type: ignore[misc]  # Ray is untyped
    """Makes the workers one process group. NOTE: Ray's node ends those that do not answer, even stopped ones, by SIGKILL."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        self._job.wait_for_ranks()

    def after_worker_group_start(self, worker_group: Any) -> None:
        worker_group._worker_health_check_timeout_s = self._job.hang_timeout_s
        try:
            address, port = worker_group.execute_single(0, get_address_and_port)
            store = self._job.logs / "ray" / f"store-{uuid.uuid4().hex}"
            store.parent.mkdir(parents=True, exist_ok=True)
            ray.get(worker_group.execute_async(self._job.join, address, port, store), timeout=self._job.hang_timeout_s)
        except BaseException as error:
            # NOTE: Ray Train ends the workers, and gives back their cores, of a group only that counts as not started.
            worker_group._clear_state()
            if isinstance(error, RayTaskError) and isinstance(error.cause, UserError):
                raise error.cause from None
            raise


class _FixedSize(ControllerCallback):  # type: ignore[misc]  # Ray is untyped
    """Always the same number of workers, and no word to an autoscaler beyond the placement group that asks for them."""

    def __init__(self, scaling_config: ScalingConfig, job: Job) -> None:
        self.scaling_config, self._job = scaling_config, job
        self._is_told = False

    def make_decision_for_non_running_worker_group(self) -> ResizeDecision | NoopDecision:
        if line := _lost_room(self._job):
            if not self._is_told:
                _tell(self._job, line)
            self._is_told = True
            time.sleep(ROOM_POLL_S)
            return NoopDecision()
        self._is_told = False
        return ResizeDecision(self.scaling_config.num_workers, self.scaling_config.resources_per_worker)

    def make_decision_for_running_worker_group(self, **_: Any) -> NoopDecision:
        return NoopDecision()


class _Restarts(FailurePolicy):  # type: ignore[misc]  # Ray is untyped
    """Asks policy.py whether to start the workers again, and leaves a line for the user where it does."""

    def __init__(self, job: Job) -> None:
        super().__init__(FailureConfig(max_failures=job.max_failures))
        self._job = job
        self._kernel_kills = kernel_kills()
        self._count, self._size = 0, 0
        self._before: Mapping[int, str] | None = None

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        if _last_word(training_failed_error):
            return FailureDecision.RAISE
        if _is_start_timeout(training_failed_error) and _lost_room(self._job):
            return FailureDecision.RETRY  # once there is room again
        failures, allowed = self.failures(training_failed_error), self.failure_config.max_failures
        size = self._job.metrics.stat().st_size if self._job.metrics.exists() else 0
        self._count += 1
        if not should_restart(failures, self._before, size != self._size, self._count, allowed):
            return FailureDecision.RAISE
        self._before, self._size = failures, size
        _tell(self._job, restart_line(failures, self._count, allowed))
        self._job.started_file.unlink(missing_ok=True)
        return FailureDecision.RETRY

    def failures(self, error: TrainingFailedError) -> dict[int, str]:
        """What happened to each rank that failed, in a line."""
        lost = LOST if kernel_kills() == self._kernel_kills else f"{OUT_OF_MEMORY}: the kernel ended a process of its machine"
        return {rank: _one_line(failure, lost) for rank, failure in _errors(error).items()}


def _lost_room(job: Job) -> str:
    """A line for the user where the nodes that are left have too little for the workers."""
    return waiting_line(job.ask, Room.of(ray.cluster_resources(), "the cluster"))


def _is_start_timeout(error: TrainingFailedError) -> bool:
    return isinstance(error, ControllerError) and isinstance(error.controller_failure, WorkerGroupStartupTimeoutError)


def _tell(job: Job, line: str) -> None:
    with job.restarts_file.open("a") as file:
        file.write(f"{line}\n")


def _errors(error: TrainingFailedError) -> dict[int, Exception]:
    return dict(error.worker_failures) if isinstance(error, WorkerGroupError) else {}


def _last_word(error: TrainingFailedError) -> UserError | TrainingError | None:
    """What the controller itself, or the lowest rank that did, found that no other attempt would change."""
    found = [error.controller_failure] if isinstance(error, ControllerError) else [e for _, e in sorted(_errors(error).items())]
    return next((failure for failure in found if isinstance(failure, (UserError, TrainingError))), None)


def _one_line(error: Exception, lost: str) -> str:
    if isinstance(error, WorkerHealthCheckFailedError):
        error = error.health_check_failure
    if isinstance(error, (NoMemoryError, StuckError)):
        return redact(str(error))
    if isinstance(error, OutOfMemoryError):  # Ray's: it watches the memory of a node, and kills before the kernel would
        return f"{OUT_OF_MEMORY}: its node is full, so that Ray ended it"
    if isinstance(error, WorkerHealthCheckTimeoutError):
        return SILENT
    if isinstance(error, RayActorError):
        return lost
    text = redact(" ".join(str(error).split()))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
