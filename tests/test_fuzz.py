"""Random and mutated configurations through the real command line: a valid run, or exit status 2 and one line; no hang.

`pytest -m slow tests/test_fuzz.py` runs all of NUM_CASES, the README's test line every 120th and all DOCUMENTS, `-m thorough`
as many others.
"""

import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from distcond.cli import main
from distcond.compose import load_config, to_dict
from tests.fuzz_cases import DOCUMENTS, NUM_CASES, Case, case_of
from tests.helpers import HANG_S

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[1]
LIMIT_S = 10
"Processor time of one case; most take 0.1 s, the first one 2 s of imports."
QUICK = 120
"The test line takes every case whose number this divides."


class Hang(BaseException):
    """Not an Exception, so that the command line cannot take it for a failure of its own."""


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise Hang after so many seconds of processor time, or twelve times as many of any."""

    def stop(number: int, frame: object) -> None:
        raise Hang

    limits = {signal.SIGPROF: (signal.ITIMER_PROF, seconds), signal.SIGALRM: (signal.ITIMER_REAL, 12 * seconds)}
    before = {number: signal.signal(number, stop) for number in limits}
    for timer, limit in limits.values():
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for number, (timer, _) in limits.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


def written(case: Case, folder: Path) -> list[str]:
    """The arguments of a case whose files have been written."""
    for name, data in case.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return ["train", "--dry-run", *(word.replace("{here}", str(folder)) if "{here}" in word else word for word in case.argv)]


def complaint(status: int, out: str, err: str, folder: Path) -> str:
    """What is wrong about an answer; empty: nothing."""
    if status == 2:
        is_one_line = (
            err.startswith("distcond: error: ") and err.count("\n") == 1 and err.endswith("\n") and err.rstrip("\n").isprintable()
        )
        return "" if is_one_line and not out else "status 2, but not one line"
    if status != 0 or err:
        return f"status {status}"
    shown = folder / "shown.yaml"
    shown.write_text(out.partition("\ndense parameters ")[0])
    again = to_dict(load_config(shown))
    return "" if again == yaml.safe_load(shown.read_text()) else "what is shown is not what is read back"


def check(number: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> int:
    """Put a case to the command line; returns the exit status."""
    case = case_of(number)
    (folder / str(number)).mkdir()
    argv = written(case, folder / str(number))
    try:
        with time_limit(LIMIT_S):
            status = main(argv)
    except Hang:
        pytest.fail(f"case {number} takes longer than {LIMIT_S} s: {argv}")
    told = complaint(status, *capsys.readouterr(), folder / str(number))
    assert not told, f"case {number}: {told}: {argv}"
    return status


def check_all(numbers: range, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the cases fails, hangs or leaves a file behind, and there is something of either kind among them."""
    monkeypatch.chdir(tmp_path)
    for name in ("files", "work", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    statuses = Counter(check(number, tmp_path / "files", capsys) for number in numbers)
    assert min(statuses[0], statuses[2]) > len(numbers) / 20
    assert not [*(tmp_path / "work").iterdir(), *(tmp_path / "temporary").iterdir()]


def test_a_configuration_is_run_or_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_all(range(0, NUM_CASES, QUICK), tmp_path, capsys, monkeypatch)


@pytest.mark.thorough
def test_another_configuration_is_run_or_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_all(range(QUICK // 2, NUM_CASES, QUICK), tmp_path, capsys, monkeypatch)


@pytest.mark.slow
def test_any_configuration_is_run_or_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_all(range(NUM_CASES), tmp_path, capsys, monkeypatch)


@pytest.mark.parametrize("number", range(len(DOCUMENTS)))
def test_a_document_that_is_no_run_is_told_in_one_line(
    number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check(number, tmp_path, capsys)


@pytest.mark.parametrize("number", [NUM_CASES - 1, NUM_CASES - 2, NUM_CASES - 3])
def test_a_process_of_its_own_answers_alike(number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = written(case_of(number), tmp_path)
    command = [sys.executable, "-m", "distcond", *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert not complaint(done.returncode, done.stdout, done.stderr, tmp_path)
    status, (out, err) = main(argv), capsys.readouterr()
    untimed = [re.sub(r"a crash costs .*", "", text) for text in (out, done.stdout)]
    assert (status, untimed[0], err) == (done.returncode, untimed[1], done.stderr)
