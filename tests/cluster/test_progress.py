import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from distcond.cluster.progress import Progress, Tail, duration, figures, seconds_left


def append(file: Path, *rows: dict[str, float | None]) -> None:
    with file.open("a") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


def test_a_tail_gives_each_new_line_once_and_only_whole_ones(tmp_path: Path) -> None:
    file = tmp_path / "file"
    assert Tail(file).read() == []
    file.write_text("old\n")
    tail = Tail(file)
    assert tail.read() == []
    with file.open("a") as stream:
        for text, lines in (("a\nb", ["a"]), ("", []), ("\nc\n", ["b", "c"])):
            stream.write(text)
            stream.flush()
            assert tail.read() == lines


def test_a_tail_follows_a_file_that_is_cut_back(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("1\n2\n3\n")
    tail = Tail(file)
    file.write_text("1\n")
    assert tail.read() == []
    file.write_text("1\n2 again\n")
    assert tail.read() == ["2 again"]


def test_a_tail_that_looks_late_still_sees_whole_lines_of_a_file_that_was_cut_back(tmp_path: Path) -> None:
    file, shorter = tmp_path / "file", tmp_path / "shorter"
    file.write_text("".join(f"{number}\n" for number in range(5)))
    tail = Tail(file)
    shorter.write_text("0\n1\n")
    shorter.replace(file)
    with file.open("a") as stream:
        stream.writelines(f"{number}, written again\n" for number in range(2, 9))
    assert tail.read() == ["0", "1", *(f"{number}, written again" for number in range(2, 9))]


def test_storage_that_does_not_answer_has_no_new_lines(tmp_path: Path) -> None:
    file, elsewhere = tmp_path / "file", tmp_path / "elsewhere"
    file.write_text("1\n")
    tail = Tail(file, whole=True)
    file.rename(elsewhere)
    file.symlink_to(file)  # any look at it fails, and not because it is missing
    assert tail.read() == []
    elsewhere.replace(file)
    assert tail.read() == ["1"]


def test_a_run_that_is_cut_back_and_goes_on_is_timed_from_where_it_does(tmp_path: Path) -> None:
    metrics, shorter, screen = tmp_path / "metrics.jsonl", tmp_path / "shorter", io.StringIO()
    append(metrics, *({"step": step, "train/loss": 9.0} for step in (10, 80)))
    with Progress(Console(file=screen, width=80), metrics, max_steps=100) as progress:
        append(shorter, {"step": 10, "train/loss": 9.0}, {"step": 70, "train/loss": 1.0})
        shorter.replace(metrics)
        progress.poll()
    assert screen.getvalue().splitlines() == ["step 70/100  loss 1"]


def test_what_is_shown_holds_no_secret(tmp_path: Path) -> None:
    screen = io.StringIO()
    with Progress(Console(file=screen, width=80), tmp_path / "metrics.jsonl", max_steps=1) as progress:
        progress.note("no answer at https://joe:word@host/x")
    assert screen.getvalue() == "no answer at https://***@host/x\n"


def test_without_a_terminal_there_is_a_line_at_most_every_few_seconds_and_one_at_the_end(tmp_path: Path) -> None:
    metrics, screen = tmp_path / "metrics.jsonl", io.StringIO()
    append(metrics, {"step": 10, "train/loss": 9.0})  # of the run that this one continues
    with Progress(Console(file=screen, width=40), metrics, max_steps=100) as progress:
        progress.wait_for("Ray")
        progress.poll()
        append(metrics, {"step": 20, "train/loss": 3.0, "train/bpb": 4.5})
        progress.poll()
        for step in (30, 40):
            append(metrics, {"step": step, "train/loss": 2.0, "ponder/steps": None, "perf/tokens_per_s": 12345.6})
            progress.poll()
        append(metrics, {"step": 40, "val/bpb": 2.25})
        progress.poll()
    first, second, last = screen.getvalue().splitlines()
    assert first == "waiting for Ray ..."
    assert second == "step 20/100  loss 3  4.500 bits/byte"
    assert last.startswith("step 40/100  loss 2  4.500 bits/byte  val 2.250 bits/byte  12,346 tokens/s  ")
    assert last.endswith(" left")


def test_on_a_terminal_there_is_a_bar(tmp_path: Path) -> None:
    metrics, screen = tmp_path / "metrics.jsonl", io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    with Progress(console, metrics, max_steps=100) as progress:
        progress.wait_for("Ray")
        append(metrics, {"step": 20, "train/loss": 3.0})
    assert "20/100" in screen.getvalue()
    assert "loss 3" in screen.getvalue()


def test_figures_are_shown_in_one_order() -> None:
    row = {"perf/tokens_per_s": 1.0e6, "step": 3, "val/sequence_error": 0.5, "train/loss": 0.69312, "tree/dead_leaves": 1.0}
    assert figures(row) == "loss 0.6931  val error 0.5  1,000,000 tokens/s"


@pytest.mark.parametrize(
    ("first", "now", "left"),
    [((0, 0.0), (25, 10.0), 30.0), ((50, 5.0), (75, 15.0), 10.0), ((50, 5.0), (100, 15.0), 0.0), ((50, 5.0), (50, 9.0), None)],
)
def test_time_left_follows_the_pace_of_this_session(first: tuple[int, float], now: tuple[int, float], left: float | None) -> None:
    assert seconds_left(first, now, max_steps=100) == left


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (7, "0:07"), (59.6, "1:00"), (750, "12:30"), (3723, "1:02:03")])
def test_durations_read_like_a_clock(seconds: float, text: str) -> None:
    assert duration(seconds) == text
