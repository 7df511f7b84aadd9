"""Which wandb run mirrors a run folder, and how much of it a server has."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distcond.config import TrackingConfig
from distcond.redaction import without_user

SENT_FILE = Path("wandb") / "sent.json"
"In a run folder: the id of the wandb run, and for each server the last step that it has."


@dataclass(frozen=True, slots=True)
class WandbRun:
    """What a wandb run is called and shown with."""

    id: str
    name: str
    project: str
    group: str
    tags: list[str]
    config: dict[str, Any]

    def arguments(self, folder: Path) -> dict[str, Any]:
        """Of `wandb.init`, which keeps its own files in RUN/wandb."""
        return asdict(self) | {"dir": str(folder)}


def wandb_run(folder: Path, tracking: TrackingConfig, config: dict[str, Any]) -> WandbRun:
    """The wandb run of a run folder; its id stays when the folder is moved after something of it was sent.

    Runs of the same name in other folders, e.g. trials of two sweeps, are other runs.
    """
    known = _read(folder).get("id")
    name = folder.name
    run_id = known or f"{name}-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]}"
    return WandbRun(run_id, name, tracking.project, tracking.group, list(tracking.tags), config)


def server() -> str:
    """What `sent.json` calls the server that wandb would ask."""
    return without_user(os.environ.get("WANDB_BASE_URL", "")).rstrip("/") or "default"


def last_sent(folder: Path) -> int:
    """The last step that the server is known to have; -1: none."""
    return int(_read(folder).get("sent", {}).get(server(), -1))


def _read(folder: Path) -> dict[str, Any]:
    file = folder / SENT_FILE
    sent: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return sent
