"""A run beside its parent, beside the run it was evaluated against, and beside the controls of halting."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distcond.config import Config
from distcond.report import report
from distcond.report.before import growth
from distcond.report.beside import against
from distcond.report.cards import cards
from distcond.report.controls import chance_table, fixed
from distcond.report.curves import spending_figures
from distcond.report.gather import RunFacts, read_run
from distcond.report.spending import Spending
from distcond.report.verdict import verdict
from distcond.train.fits import cost_of
from tests.helpers import changed
from tests.report.conftest import CHANCE, EVALUATION, path_of


@pytest.fixture(name="copied")
def make_copy(family: Path, tmp_path: Path) -> Path:
    """The family somewhere else, to be changed; where its configurations point to is gone."""
    shutil.copytree(family, tmp_path / "moved")
    text = (tmp_path / "moved/grown/config.yaml").read_text().replace(str(family), str(tmp_path / "gone"))
    (tmp_path / "moved/grown/config.yaml").write_text(text)
    return tmp_path / "moved"


def rows_of(table: Any) -> dict[str, list[Any]]:
    return {row[0].text: [cell.value for cell in row[1:]] for row in table.rows}


def test_a_grown_run_stands_beside_its_parent(family: Path, tmp_path: Path) -> None:
    run, parent = read_run(family / "grown"), read_run(family / "dense")
    found = growth(run)
    assert found is not None and found.table is not None and found.figure is not None
    text = " ".join(found.sentences)
    assert "weights of dense" in text and "at step 4; up became a tree of depth 3" in text and ": the same function." in text
    assert f"distcond evaluate {family / 'grown'} --against {family / 'dense'}" in text
    rows = rows_of(found.table)
    assert rows["bits per byte"] == pytest.approx([parent.quality, run.quality, run.quality / parent.quality])  # type: ignore[operator]
    assert rows["updates of its own"] == [4, 3, 0.75]
    costs = [cost_of(one.config) for one in (parent, run)]
    assert rows["parameters, all nodes"][:2] == [cost.dense_parameters + cost.node_parameters for cost in costs]
    assert rows["MACs per byte"][:2] == [parent.macs, run.macs]
    assert "train.max_steps=3" in found.control and "model.tree.depth=0" in found.control and "dense-again" in found.control
    page = report([family / "grown"], tmp_path / "page.html").read_text()
    assert 'id="before"' in page and "up became a tree of depth 3" in page
    # Validations of the parent at 2 and 4, of the run at its 0, 2 and 3.
    for steps in (2, 4, 6, 7):
        assert f"updates, the parent&#39;s included {steps}\n" in page
    assert growth(parent) is None and 'id="before"' not in report([family / "dense"], tmp_path / "dense.html").read_text()


def test_a_tree_that_got_further_levels_is_told(family: Path) -> None:
    run = read_run(family / "grown")
    deeper = changed(run.config, train__init_from=str(family / "grown"), model__tree__depth=5)
    found = growth(replace(run, config=deeper, origin_step=run.step))
    assert found is not None and found.sentences[0].endswith("; up became 5 levels deep, from 3.")


def test_a_parent_that_moved_with_the_run_is_found_and_one_that_is_gone_is_named(copied: Path) -> None:
    found = growth(read_run(copied / "grown"))
    assert found is not None and found.table is not None and str(copied / "dense") in found.sentences[0]
    shutil.rmtree(copied / "dense")
    found = growth(read_run(copied / "grown"))
    assert found is not None and (found.table, found.figure, found.control) == (None, None, "")
    assert "gone/dense, which is gone" in found.sentences[0]


def test_the_parent_is_as_it_was_when_the_run_started(copied: Path) -> None:
    """Rows and evaluations of the time since, and another halting, make no difference to what it was."""
    with (copied / "dense/metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 6, "val/bpb": 0.5}) + "\n")
    (copied / "dense/eval").mkdir(exist_ok=True)
    (copied / "dense/eval/step_00000006.json").write_text(json.dumps({"val/bpb": 0.5}))
    (copied / "dense/eval/step_00000004.json").write_text(json.dumps({"val/bpb": 7.5, "val/bpb/low": 7.25, "val/bpb/high": 8.0}))
    shutil.rmtree(copied / "dense/checkpoints")
    found = growth(read_run(copied / "grown"))
    assert found is not None and found.table is not None
    rows = rows_of(found.table)
    assert (rows["bits per byte"][0], rows["from (95% interval)"], rows["to"]) == (7.5, [7.25, None, None], [8.0, None, None])


def _lower_the_first_row(run: RunFacts) -> RunFacts:
    return replace(run, rows=[{**row, "val/bpb": 0.5} if row["step"] == 0 else row for row in run.rows])


CHANGES: dict[str, tuple[Callable[[RunFacts], RunFacts], str]] = {
    "another function": (_lower_the_first_row, "another function, which it ought not to be"),
    "other halting": (
        lambda run: replace(run, config=changed(run.config, model__halting__max_steps=3)),
        "it halts otherwise, so it was another function from the start",
    ),
    "no first row": (lambda run: replace(run, rows=run.rows[1:]), "is not known: there is no validation of both"),
    "an earlier checkpoint": (lambda run: replace(run, origin_step=3), "not the weights it started from"),
    "other data": (
        lambda run: replace(run, config=changed(run.config, data__context=8)),
        "cannot be set beside it: .* data.context=8",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_is_not_the_same_function_is_not_called_so(case: str, family: Path) -> None:
    change, told = CHANGES[case]
    found = growth(change(read_run(family / "grown")))
    assert found is not None
    assert re.search(told, " ".join(found.sentences)) and "the same function" not in found.sentences[-1]


@pytest.fixture(name="evaluated")
def make_evaluated(text_run: Config) -> RunFacts:
    return replace(read_run(path_of(text_run)), evaluation=EVALUATION | CHANCE)


def test_another_run_stands_beside_with_the_interval_of_the_difference(evaluated: RunFacts) -> None:
    found = against(evaluated)
    assert found is not None
    assert "minus other: −0.5 (95% interval −0.75 to −0.25), better." in found.difference
    rows = rows_of(found.table)
    assert rows == {
        "bits per byte": [2.5, 2.0, 0.8],
        "ponder steps": [1.0, 2.5, 2.5],
        "ms, batch 1, p50": [1.5, 3.0, 2.0],
    }
    assert "It is better than other: −0.5 bits per byte" in verdict(evaluated, [evaluated], [])[2]
    for high, told in ((0.25, "not told apart"), (-0.25, "better")):
        run = replace(evaluated, evaluation=evaluated.evaluation | {"against/difference/high": high})
        assert told in (against(run) or found).difference
    assert against(replace(evaluated, evaluation={"against": "x"})) is None


def test_chance_is_shown_for_each_way_of_shuffling(evaluated: RunFacts) -> None:
    table = chance_table(evaluated)
    assert table is not None
    told = [[cell.text for cell in row] for row in table.rows]
    assert told == [
        ["loss", "+0.500", "over all positions", "-0.100 to +0.100", "0.005", "above chance"],
        ["loss", "+0.500", "whole sequences, at equal positions", "+0.300 to +0.600", "0.25", "as by chance"],
    ]
    assert "but not beyond what the place in a sequence decides" in verdict(evaluated, [evaluated], [])[2]
    assert chance_table(replace(evaluated, evaluation=EVALUATION)) is None


def test_fixed_steps_stand_beside_halting(evaluated: RunFacts) -> None:
    found = fixed(evaluated)
    assert found is not None
    cost = cost_of(evaluated.config)
    rows = rows_of(found.table)
    own = cost.macs(2.5)
    assert rows == {
        "1 for all": pytest.approx([cost.macs(1), cost.macs(1) / own - 1, 3.0, 1.0]),
        "2 for all": pytest.approx([cost.macs(2), cost.macs(2) / own - 1, 1.9, -0.1]),
        "3 for all": pytest.approx([cost.macs(3), cost.macs(3) / own - 1, 2.5, 0.5]),
        "2.5, as inputs decide": [own, 0, 2.0, 0],
    }
    # Two steps for all are cheaper and better: what halting saves is no saving.
    assert found.figure.chart.count('class="mark main"') == 2 and found.figure.chart.count('class="mark other"') == 2
    assert ("with 2 steps for all", "1.9") in cards(evaluated)[0].lines
    assert fixed(replace(evaluated, evaluation={})) is None


def test_the_histogram_is_that_of_the_whole_validation_set_where_it_is_known(evaluated: RunFacts) -> None:
    spent = Spending([], [], [], "", [(1, 0.5), (3, 0.5)], 20, "byte", 0.1)
    (figure,) = spending_figures(evaluated, spent)
    assert "whole validation set: mean 2.5, median 2, 95% take at most 4" in figure.note
    assert figure.chart.count("25% of bytes") == 4
    for bad in ([], ["x"], {"1": 1.0}, None):
        run = replace(evaluated, evaluation={"val/ponder/steps_histogram": bad})
        (figure,) = spending_figures(run, spent)
        assert "of 20 bytes" in figure.note and figure.chart.count("50% of bytes") == 2
