"""What holds for every test, and the run that several of them read."""

import gc
import os
import signal
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from distcond.config import Config

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported: tensors are small here, and ranks share cores
os.environ["HF_HUB_OFFLINE"] = "1"  # read when `datasets` is imported; asking a hub that is out of reach takes 20 s
for name in ("RAY_ADDRESS", "FORCE_COLOR", "TTY_COMPATIBLE", "DISTCOND_LOG"):  # they change what commands do and print
    os.environ.pop(name, None)
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"  # or a proxy would be asked for servers on this machine
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as under nohup; the commands under test would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

ON_DEMAND = ("slow", "gpu", "hosts")
"Marks of tests that run only where `-m` names the mark, as do those marked thorough that bear none of these."

CASES = 3
"The most cases of a test that all run every time."

STARTING_RANKS = (
    *("tests/train/", "tests/golden/", "tests/deploy/", "tests/report/", "tests/cluster/test_initial.py"),
    *("tests/test_evaluate.py", "tests/test_bench.py", "tests/optim/test_growth.py", "tests/nn/test_gates_ddp.py"),
)
"Files that fork ranks from a server (tests/helpers.py); under `-n 2` they share one worker, hence one server and one `text_run`."

gc.disable()  # until all is collected: what is imported is there to stay, and to look through it again takes 5% of the time


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("file_or_dir"):
        _mark_repetitions(items)
    asked = config.getoption("markexpr")

    def is_left_out(item: pytest.Item) -> bool:
        marks = [mark for mark in ON_DEMAND if item.get_closest_marker(mark)] or ["thorough"]
        return any(item.get_closest_marker(mark) and mark not in asked for mark in marks)

    left_out = [item for item in items if is_left_out(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def _mark_repetitions(items: list[pytest.Item]) -> None:
    """Of a test with more than CASES cases only the first and the last run wherever no file is named; all do so thoroughly."""
    cases = defaultdict(list)
    for item in items:
        cases[item.nodeid.split("[")[0]].append(item)
    for same in cases.values():
        for item in same[1:-1] if len(same) > CASES else []:
            item.add_marker(pytest.mark.thorough)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """As --dist=loadfile, with the files of STARTING_RANKS as one."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ranks" if nodeid.startswith(STARTING_RANKS) else super()._split_scope(nodeid)

    return ByFile(config, log)


@pytest.fixture(scope="session")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> "Config":
    """A finished run on text, on 2 ranks, with validations, checkpoints and a profile; not to be changed."""
    # NOTE: imported here, because most tests need no torch.
    from distcond.compose import save_config
    from tests.helpers import text_config, train_run

    rhythm = {"train__max_steps": 12, "train__log_every": 3, "train__eval_every": 5, "checkpoint__every": 6}
    config = text_config(tmp_path_factory.mktemp("text"), cluster__num_workers=2, train__profile=True, **rhythm)
    train_run(config)
    save_config(config, Path(config.run.dir) / config.run.name / "config.yaml")
    return config
