"""What the report of some runs is made of, and the file it is written to."""

import datetime
import secrets
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from distcond import __version__
from distcond.command_line import train_line
from distcond.compose import to_yaml
from distcond.config import RunConfig
from distcond.data.batch import select
from distcond.errors import RunError
from distcond.opened import OpenedRun, open_checkpoint, threads
from distcond.redaction import redact
from distcond.report import curves, tables
from distcond.report.before import growth
from distcond.report.beside import against
from distcond.report.cards import cards
from distcond.report.controls import chance_table, fixed
from distcond.report.gather import RunFacts, check_comparable, read_run
from distcond.report.levels import levels_of
from distcond.report.probe import probe
from distcond.report.render import render
from distcond.report.spending import Spending, spending
from distcond.report.tree_map import TreeMap, tree_map
from distcond.report.verdict import has_fixed, verdict
from distcond.report.words import visible
from distcond.train.run_folder import check_can_hold
from distcond.train.table_files import tree_layers

FLIP_POSITIONS = 512
"Positions that flipped bits are tried on."
MOST_SAMPLES, LONGEST_SAMPLE = 4, 2000


def report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write one HTML page about runs of the same data; maps and curves are those of the first one. Returns the file.

    out: None: report.html in the folder of the first run. Raises RunError where a run cannot be read, goes on or has other
    data than the first, and where the file cannot be written.
    """
    file = runs[0] / "report.html" if out is None else out
    check_can_hold("--out", file, "report.html")
    facts = [read_run(run) for run in runs]
    check_comparable(facts)
    with threads(1):
        spent, trees = _maps(open_checkpoint(facts[0].folder, facts[0].config, facts[0].checkpoint))
    text = render(**_found(facts, spent, trees))
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        raise RunError(f"{file} cannot be written ({error.strerror}); choose another place by --out FILE.") from error
    return file


def _maps(opened: OpenedRun) -> tuple[Spending, list[TreeMap]]:
    """Where computation and tokens go in a model."""
    task, learner = opened.feeder.task, opened.learner
    seen = probe(learner, task, opened.config.data.validation_examples)
    if not np.isfinite(seen.positions.nll[seen.positions.valid]).all():
        raise RunError(
            f"{opened.checkpoint} answers with NaN or infinity, so there is nothing to map; report a run that has learned."
        )
    flipped = select(seen.batch, slice(0, max(1, FLIP_POSITIONS // task.max_length)))
    trees = []
    for name, layer in tree_layers(learner).items():
        if layer.depth and name in seen.layers:
            levels = levels_of(learner, layer, seen.layers[name], flipped)
            trees.append(tree_map(name, layer, seen.layers[name], levels, opened.checkpoint, opened.step))
    return spending(task, seen), trees


def _found(facts: Sequence[RunFacts], spent: Spending, trees: Sequence[TreeMap]) -> dict[str, Any]:
    """What the template shows."""
    run = facts[0]
    figures = cards(run)
    figure, front = curves.against_computation(facts)
    paths = [shlex.quote(str(one.folder.path)) for one in facts]
    return {
        "version": __version__,
        "made": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "run": run,
        "runs": facts,
        "quoted": paths[0],
        "verdict": verdict(run, facts, trees),
        "cards": figures,
        "missing": [card.title.lower() for card in figures if not card.is_complete],
        "learning": curves.learning_curves(run, facts),
        "against": figure,
        "runs_table": tables.runs_table(facts, front),
        "quadrants": tables.quadrants(facts),
        "beside": against(run),
        "growth": growth(run),
        "fixed_command": tables.fixed_command(run) if run.ponders and not has_fixed(run, facts) else "",
        "updates": {one.step for one in facts},
        "foremost": curves.FOREMOST + (len(facts) > 1),
        "spent": spent,
        "spending_figures": curves.spending_figures(run, spent),
        "groups": tables.groups_table(spent) if spent.groups else None,
        "chance": chance_table(run),
        "fixed": fixed(run),
        "trees": [
            {
                "map": tree,
                "figures": curves.tree_figures(tree),
                "levels": tables.levels_table(tree),
                "nodes": tables.nodes_table(tree),
                "ranks": tables.ranks_table(tree) if tree.ranks else None,
            }
            for tree in trees
        ],
        "samples": [_sample(sample) for sample in run.samples[:MOST_SAMPLES]],
        "settings": tables.settings_table(run),
        "yaml": redact(to_yaml(run.config)),
        "environment": tables.environment_table(run),
        "commands": [
            (
                "Train it again (another run.name makes it a new run)",
                redact(train_line(run.config, {"run.dir": RunConfig().dir})),
            ),
            ("Measure it", f"distcond evaluate {paths[0]}"),
            ("Make this page again", f"distcond report {' '.join(paths)}"),
        ],
    }


def _sample(sample: dict[str, Any]) -> list[tuple[str, str]]:
    """What an example was, should give and gave; in a text of the same length what is wrong is marked."""
    shown = {name: _shown(sample[name]) for name in ("input", "target", "prediction") if name in sample}
    if isinstance(sample.get("target"), str) and {"target", "prediction"} <= shown.keys():
        shown["prediction"] = _marked(sample["target"], sample["prediction"])
    return [*shown.items(), ("wrong elements", str(sample.get("wrong", "–")))]


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else "\n".join(map(str, value)) if isinstance(value, list) else str(value)
    return visible(text[:LONGEST_SAMPLE])


def _marked(target: str, prediction: Any) -> str:
    if not isinstance(prediction, str) or len(target) != len(prediction):
        return _shown(prediction)
    pairs = list(zip(prediction, target, strict=True))[:LONGEST_SAMPLE]
    return Markup("").join(Markup("{}" if given == wanted else "<b>{}</b>").format(visible(given)) for given, wanted in pairs)
