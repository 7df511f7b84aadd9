"""What runs in each Ray Train worker: one rank of a run."""

import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from distcond.cluster.feeder import RayFeeder
from distcond.cluster.host import LOOPBACK, check_data, check_storage, choose_interface, this_host
from distcond.cluster.memory import out_of_memory
from distcond.cluster.notes import post
from distcond.cluster.pulse import Pulse, StuckError
from distcond.config import Config
from distcond.redaction import redact
from distcond.train.run_folder import RunFolder

# NOTE: what is imported inside the functions is for the worker alone: Ray Train, which the driver does not need, and, once
# the process has the environment that they read and the log file that they write to, torch and the training loop.

log = logging.getLogger(__name__)

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"How long a rank waits for the others, e.g. while rank 0 writes a large checkpoint."
UNHEARD_S = 10.0
"How long a rank that stands still waits to be ended."
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True, kw_only=True)
class Rank:
    """What every worker is told; its number it learns from Ray."""

    config: Config
    settings: dict[str, Any]
    "The configuration as plain containers."
    num_threads: int
    started_file: Path
    "Created by rank 0 when training begins."
    proof_file: Path
    "In the run folder: what every host must see there."
    proof: str
    "Its contents."
    data: Mapping[str, Any]
    "What the examples are, as in `host.data_identity`."
    head: str
    "The host that the run was started on, as in `host.this_host`."

    def join(self, address: str, port: int, store: Path) -> None:
        """Become one of the ranks: own log file, environment, threads, process group with rank 0 at address:port.

        store: a new file by which ranks of one machine find one another. Where Ray is closed to other machines, so are they.
        """
        import ray.train

        context, here = ray.train.get_context(), ray.util.get_node_ip_address()
        rank, world_size = context.get_world_rank(), context.get_world_size()
        check_storage(self.proof_file, self.proof, self.config.run.dir, this_host(here), self.head)
        _end_with_parent()
        _log_to(RunFolder.of(self.config).logs / f"rank_{rank}.log", rank)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR=address, MASTER_PORT=str(port))
        os.environ.update(LOCAL_RANK=str(context.get_local_rank()), LOCAL_WORLD_SIZE=str(context.get_local_world_size()))
        has_gpu = self.config.cluster.gpus_per_worker > 0
        os.environ["DS_ACCELERATOR"] = "cuda" if has_gpu else "cpu"
        if not has_gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""

        import torch

        torch.set_num_threads(self.num_threads)
        if has_gpu:
            torch.cuda.set_device(context.get_local_rank())
        choose_interface(here)
        where = f"file://{store}" if address == LOOPBACK else None  # NOTE: torch's own store listens on all addresses
        backend, place = "nccl" if has_gpu else "gloo", {"rank": rank, "world_size": world_size}
        torch.distributed.init_process_group(backend, init_method=where, timeout=COLLECTIVE_TIMEOUT, **place)

    def train(self) -> dict[str, Any]:
        """Run the training loop; returns the summary. UserErrors pass as they are."""
        import ray.train

        context, here = ray.train.get_context(), ray.util.get_node_ip_address()
        rank = context.get_world_rank()
        if this_host(here) != self.head:
            check_data(self.config, self.data, this_host(here), self.head)
        feeder = RayFeeder(self.config, rank, context.get_world_size())
        pulse = Pulse(feeder, self.config.cluster.hang_timeout_s, _give_up)
        folder = RunFolder.of(self.config)
        try:
            import torch

            from distcond.train.loop import run_training

            if rank == 0:
                self.started_file.touch()
            with folder.writing():
                summary = run_training(self.config, folder, pulse, self.settings, self._note)
            torch.distributed.destroy_process_group()
            return summary
        except (MemoryError, RuntimeError) as error:
            if short := out_of_memory(error):
                raise short from error
            raise
        finally:
            pulse.close()
            feeder.close()

    def _note(self, line: str) -> None:
        log.warning("%s", line)
        post(str(RunFolder.of(self.config).path), redact(line))


def _end_with_parent() -> None:
    """Have the kernel kill this process with Ray's of this node, which ends with the command.

    NOTE: a rank would notice by itself, 2 s later, but not while it is stopped.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _give_up(error: StuckError) -> None:
    """Have Ray Train end all ranks; this one ends itself where its host is cut off, or it would keep the others waiting."""
    _error_queue().put(error)
    time.sleep(UNHEARD_S)
    os._exit(1)


def _error_queue() -> Any:
    """Where Ray Train looks for errors of this worker that are not raised by the training function."""
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().execution_context.training_thread_runner.get_exception_queue()


def _log_to(file: Path, rank: int) -> None:
    """Send what this process and its libraries print, warn and log into a file, whatever they print it with."""
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, sys.stdout.fileno())
    os.dup2(descriptor, sys.stderr.fileno())
    os.close(descriptor)
    logging.basicConfig(level=logging.INFO, force=True)
    logging.root.handlers[0].setFormatter(_Redacted(f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s"))


class _Redacted(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))
