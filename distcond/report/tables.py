"""The tables of the page: columns that are text or numbers, rows that sort by their header."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distcond.command_line import overrides_of, train_line
from distcond.config import HaltingKind, RunConfig
from distcond.redaction import redact
from distcond.report.gather import RunFacts
from distcond.report.spending import Spending
from distcond.report.tree_map import MOST_ROWS, TreeMap, path_of
from distcond.report.verdict import quality_text, quality_unit
from distcond.report.words import large, percent, show
from distcond.train.run_folder import flat


@dataclass(frozen=True, slots=True)
class Cell:
    """What is shown, and what is sorted by: a number, None where it is missing, or the text itself."""

    text: str
    value: float | str | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """A table."""

    caption: str
    columns: Sequence[tuple[str, bool]]
    "Names, and whether they hold numbers."
    rows: list[list[Cell]]


@dataclass(frozen=True, slots=True)
class Quadrant:
    """A cell of the table tree x halting."""

    runs: list[str]
    "Each with its figures, the best first; empty: none was given."
    command: str
    "That would fill it."


def _number(value: float | None, text: str | None = None) -> Cell:
    return Cell(show(value) if text is None else text, value)


def _text(value: str) -> Cell:
    return Cell(value, value)


def runs_table(runs: Sequence[RunFacts], front: Sequence[int]) -> Table:
    """All runs given, with numbers as in the chart."""
    columns = [("#", True), ("run", False), ("tree depth", True), ("halting", False), ("seed", True), ("updates", True)]
    columns += [(quality_unit(runs[0]), True), ("95% interval", False), ("ponder steps", True), ("MACs", True), ("front", False)]
    rows = []
    for place, run in enumerate(runs):
        interval = " to ".join(quality_text(run, end) for end in run.interval) if run.interval else "not evaluated"
        rows.append(
            [
                *(_number(place + 1), _text(run.name), _number(run.config.model.tree.depth)),
                *(_text(halting_text(run)), _number(run.config.seed), _number(run.step)),
                *(_number(run.quality, quality_text(run, run.quality)), _text(interval), _number(run.steps, show(run.steps, 3))),
                *(_number(run.macs, large(run.macs)), _text("yes" if place in front else "no")),
            ]
        )
    return Table("Runs given; a run on the front is beaten by no other in both quality and MACs.", columns, rows)


def halting_text(run: RunFacts) -> str:
    """The kind of halting, and how many steps it may take."""
    kind = run.config.model.halting.kind
    return "one step" if kind == HaltingKind.none else f"{kind}, {'' if kind == HaltingKind.fixed else 'up to '}{run.most_steps}"


def quadrants(runs: Sequence[RunFacts]) -> list[list[Quadrant]]:
    """Without and with a tree, by without and with halting that inputs decide."""
    return [[_quadrant(runs, has_tree=has_tree, ponders=ponders) for ponders in (False, True)] for has_tree in (False, True)]


def _quadrant(runs: Sequence[RunFacts], *, has_tree: bool, ponders: bool) -> Quadrant:
    held = [run for run in runs if (run.has_tree, run.ponders) == (has_tree, ponders)]
    held.sort(key=lambda run: (run.quality is None, run.quality or 0.0))
    shown = [f"{run.name}: {quality_text(run, run.quality)} {quality_unit(run)}, {show(run.steps, 3)} steps" for run in held]
    return Quadrant(shown, "" if held else _command(runs[0], has_tree=has_tree, ponders=ponders))


def _command(run: RunFacts, *, has_tree: bool, ponders: bool) -> str:
    """The first run with the tree or halting that a cell asks for."""
    changes: dict[str, Any] = {}
    if has_tree != run.has_tree:
        changes["model.tree.depth"] = 4 if has_tree else 0
    if ponders and not run.ponders:
        changes["model.halting.kind"] = "act"
    elif run.ponders and not ponders:
        no_budget = {f"model.halting.{key}": None for key in ("target_steps", "prior_steps", "time_penalty")}
        changes |= {"model.halting.kind": "none", **no_budget}
    name = f"{run.name}-{'tree' if has_tree else 'dense'}-{'act' if ponders else 'one-step'}"
    return train_line(run.config, {**changes, "run.name": name, "run.dir": RunConfig().dir})


def fixed_command(run: RunFacts) -> str:
    """The run with as many steps for everyone as its inputs take on average."""
    steps = max(1, round(run.steps or 1))
    no_budget = {f"model.halting.{key}": None for key in ("target_steps", "prior_steps", "time_penalty")}
    changes = {"model.halting.kind": "fixed", "model.halting.max_steps": steps, **no_budget}
    return train_line(run.config, {**changes, "run.name": f"{run.name}-fixed-{steps}", "run.dir": RunConfig().dir})


def groups_table(spent: Spending) -> Table:
    """Steps, loss and errors by what elements have in common."""
    numbers = ["share", "mean steps", "loss, bits", "entropy, bits", "wrong"]
    is_number = all(group.name.isdigit() for group in spent.groups)
    rows = [
        [
            _number(float(group.name), group.name) if is_number else _text(group.name),
            *(_number(group.share, percent(group.share)), _number(group.steps), _number(group.loss), _number(group.entropy)),
            _number(group.wrong, percent(group.wrong)),
        ]
        for group in spent.groups
    ]
    return Table(f"By {spent.by}", [(spent.by, is_number), *((name, True) for name in numbers)], rows)


def levels_table(tree: TreeMap) -> Table:
    """Each level of a layer and what its bit decides."""
    names = ("level", "nodes", "visited", "dead", "rare", "mean norm", "share of output", "bit is 1", "loss if flipped, bits")
    rows = [
        [
            *(_number(level.level), _number(level.nodes), _number(level.visited), _number(level.nodes - level.visited)),
            *(_number(level.rare), _number(level.mean_norm), _number(level.output_share, percent(level.output_share))),
            *(_number(level.ones, percent(level.ones)), _number(level.flip_bits, _signed(level.flip_bits))),
        ]
        for level in tree.levels
    ]
    caption = (
        "Dead: nodes that exist and that no token of this look went through. Rare: visited, with less than a tenth of the fair "
        "share. Share of output: of the root mean squares of what each level adds. Flipped: for every token in every step."
    )
    return Table(caption, [(name, True) for name in names], rows)


def _signed(value: float | None) -> str:
    return show(value) if value is None else f"{value:+.3g}"


def nodes_table(tree: TreeMap) -> Table:
    """The busiest nodes."""
    columns = [("node (bits)", False), ("level", True), ("tokens", True), ("share", True), ("weight norm", True)]
    rows = [
        [
            *(_text(path_of(tree.layer, node)), _number(node.level), _number(node.tokens)),
            *(_number(node.width, percent(node.width)), _number(node.norm)),
        ]
        for node in tree.nodes
    ]
    return Table(f"The busiest nodes{f', {MOST_ROWS} of them' if len(rows) == MOST_ROWS else ''}", columns, rows)


def ranks_table(tree: TreeMap) -> Table:
    """What each rank serves and holds."""
    columns = [(name, True) for name in ("rank", "tokens", "load over mean", "nodes held", "subtrees")]
    mean = max(1.0, sum(rank["tokens"] for rank in tree.ranks) / max(1, len(tree.ranks)))
    rows = [
        [*map(_number, (place, rank["tokens"], rank["tokens"] / mean, rank["nodes"], rank["subtrees"]))]
        for place, rank in enumerate(tree.ranks)
    ]
    return Table("Ranks, by the subtree map of the checkpoint", columns, rows)


def settings_table(run: RunFacts) -> Table:
    """What differs from the configuration that `distcond train` composes by itself."""
    rows = [
        [_text(redact(key)), _text(redact(value))] for key, _, value in (word.partition("=") for word in overrides_of(run.config))
    ]
    return Table("Settings that differ from what distcond train composes by itself", [("key", False), ("value", False)], rows)


def environment_table(run: RunFacts) -> Table:
    """environment.json, flat."""
    rows = [[_text(redact(key)), _text(redact(str(value)))] for key, value in flat(run.environment).items()]
    return Table("Where the run was made (environment.json)", [("what", False), ("value", False)], rows)
