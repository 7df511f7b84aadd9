"""Which curves of metrics.jsonl the page shows, and what stands beside the chart of quality against computation."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from distcond.pareto import pareto_front
from distcond.report.charts import Bar, Curve, Dot, bars, columns, curves, scatter
from distcond.report.gather import STEPS, RunFacts, number, step_shares
from distcond.report.spending import Spending
from distcond.report.tables import halting_text
from distcond.report.tree_map import TreeMap
from distcond.report.verdict import quality_text, quality_unit
from distcond.report.words import large, percent, show

MOST_BARS, LEAVES_SHOWN = 24, 64
"Of a chart."
FOREMOST = 4
"Learning curves that are seen at once; the others unfold."


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart with its title and what it shows."""

    title: str
    note: str
    chart: Markup
    legend: bool = False
    "Whether solid is training and dashed validation."


CURVES = (
    ("Bits per byte", ("train/bpb", "val/bpb"), "lower is better"),
    ("Wrong sequences", ("train/sequence_error", "val/sequence_error"), "share of sequences with any mistake"),
    ("Wrong elements", ("train/element_error", "val/element_error"), "share of predictions"),
    ("Loss", ("train/loss", "val/nll"), "with the penalty on steps, nats"),
    ("Ponder steps", ("ponder/steps", "val/ponder/steps"), "mean executed steps of an element"),
    ("Penalty on steps", ("ponder/penalty",), "weight of the ponder cost, as a budget sets it"),
    ("Nodes", ("tree/materialized_nodes",), "that exist in the trees"),
    ("Spread over leaves", ("tree/leaf_entropy_nats",), "entropy of the load in nats; higher is more even"),
    ("Gradient norm", ("optim/grad_norm",), "before clipping"),
    ("Speed", ("perf/tokens_per_s",), "elements a second, all ranks"),
)
"Title, metrics (of training, of validation), note."


def learning_curves(run: RunFacts, runs: Sequence[RunFacts]) -> list[Figure]:
    """Training and validation of the first run; where several are given, the validation of all of them first."""
    figures = []
    if len(runs) > 1:
        lines = [Curve(other.name, series(other, run.quality_key), "other") for other in runs[1:]]
        lines.append(Curve(run.name, series(run, run.quality_key), "main"))
        if any(line.points for line in lines):
            chart = curves(f"{run.quality_key} of all runs by step", lines, "step", run.quality_key)
            figures.append(Figure("All runs, validation", f"{run.name} is the thick line; hover for the others' names", chart))
    for title, keys, note in CURVES:
        styles = ("second" if key.startswith("val/") else "main" for key in keys)
        lines = [Curve(key, series(run, key), style) for key, style in zip(keys, styles, strict=True)]
        if any(line.points for line in lines):
            chart = curves(f"{title} by step", lines, "step", " · ".join(line.name for line in lines if line.points))
            figures.append(Figure(title, note, chart, legend=len(keys) > 1))
    return figures


def series(run: RunFacts, key: str) -> list[tuple[float, float]]:
    """A metric by step."""
    rows = ((number(row, "step"), number(row, key)) for row in run.rows)
    return sorted((step, value) for step, value in rows if step is not None and value is not None)


def against_computation(runs: Sequence[RunFacts]) -> tuple[Figure | None, list[int]]:
    """Quality by MACs, and the places of the runs that no other beats in both."""
    known = [(place, run.quality, run.macs) for place, run in enumerate(runs) if run.quality is not None and run.macs is not None]
    front = [known[index][0] for index in pareto_front([(quality, macs) for _, quality, macs in known])]
    if not known:
        return None, []
    dots = []
    for place, quality, macs in known:
        run = runs[place]
        low, high = run.interval or (None, None)
        tip = f"{place + 1}: {run.name}\n{quality_text(run, quality)} {quality_unit(run)}\n{large(macs)} MACs"
        tip += f", {show(run.steps, 3)} steps\ntree depth {run.config.model.tree.depth}, {halting_text(run)}"
        dots.append(Dot(macs, quality, tip, str(place + 1), place in front, low, high))
    unit = "byte" if runs[0].is_text else "element"
    chart = scatter(f"{runs[0].quality_key} against MACs per {unit}", dots, f"MACs per {unit}", runs[0].quality_key)
    note = "on both axes less is better. Discs: no other run is better in both; squares are beaten. Upright bars: 95% intervals."
    return Figure("Quality against computation", note, chart), front


def spending_figures(run: RunFacts, spent: Spending) -> list[Figure]:
    """How many take how many steps, and how that goes with what they have in common."""
    if spent.correlation is None:
        return [_by_group(spent, "Loss", "loss", "mean bits")] if spent.groups else []
    figures = [_histogram(run, spent)]
    if spent.groups:
        figures += [_by_group(spent, "Steps", "steps", "mean steps"), _by_group(spent, "Loss", "loss", "mean bits")]
    return figures


def _histogram(run: RunFacts, spent: Spending) -> Figure:
    """Of the whole validation set where the run was evaluated, else of what the page looks at."""
    measured = step_shares(run)
    shares = measured or dict(spent.histogram)
    every = [(number, shares.get(number, 0.0)) for number in range(1, max(shares) + 1)]
    bins = [(str(number), share, f"{number} steps\n{percent(share)} of {spent.unit}s") for number, share in every]
    middle = [run.measured(f"{STEPS}_{name}") for name in ("p50", "p95")]
    told = f"mean {show(run.measured(STEPS), 3)}, median {show(middle[0], 3)}, 95% take at most {show(middle[1], 3)}"
    note = f"of the whole validation set: {told}" if measured else f"of {spent.positions:,} {spent.unit}s of the validation set"
    chart = columns("Share of elements by executed steps", bins, "steps", f"share of {spent.unit}s")
    return Figure("Executed steps", f"share {note}", chart)


def _by_group(spent: Spending, title: str, key: str, unit: str) -> Figure:
    """Bars by difficulty, or by place in the text, those with the most steps first."""
    counts = spent.groups[0].name.isdigit()
    rows = spent.groups if counts else sorted(spent.groups, key=lambda group: -group.steps)
    found = [
        Bar(group.name, getattr(group, key), f"{group.name}\n{unit} {show(getattr(group, key))}\n{percent(group.share)} of all")
        for group in rows[:MOST_BARS]
    ]
    return Figure(f"{title} by {spent.by}", unit, bars(f"{title} by {spent.by}", found, unit))


def tree_figures(tree: TreeMap) -> list[Figure]:
    """What levels add and decide, the load of leaves and ranks."""
    adds = [
        Bar(f"level {level.level}", 100 * level.output_share, f"level {level.level}\n{percent(level.output_share)} of the output")
        for level in tree.levels[:MOST_BARS]
    ]
    more = "; the other levels are in the table" if len(adds) < len(tree.levels) else ""
    note = f"percent of the output's norm{more}"
    figures = [Figure("What each level adds", note, bars("Share of output by level", adds, "% of output"))]
    flips = [
        Bar(f"bit {level.level}", level.flip_bits, f"bit {level.level} flipped for everyone\n{level.flip_bits:+.3g} bits of loss")
        for level in tree.levels
        if level.flip_bits is not None
    ]
    if flips:
        note = "change of the loss, bits an element, when that bit is flipped for every token in every step"
        figures.append(Figure("Which bits matter", note, bars("Loss change by flipped bit", flips, "bits of loss")))
    num_leaves = 2**tree.layer.depth
    loads = [
        (
            str(place + 1),
            100 * load,
            f"leaf {place + 1} by load\n{percent(load)} of tokens\n{show(load * num_leaves, 3)} times the mean of all",
        )
        for place, load in enumerate(tree.leaf_loads[:LEAVES_SHOWN])
    ]
    visited = f"{large(num_leaves * tree.layer.num_trees)} leaves, {len(tree.leaf_loads):,} of them visited"
    note = f"percent of tokens; the busiest {len(loads):,} of {visited}"
    figures.append(Figure("Load of leaves", note, columns("Load of the busiest leaves", loads, "leaf, by load", "% of tokens")))
    return figures
