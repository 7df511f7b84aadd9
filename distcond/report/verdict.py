"""The verdict in three sentences, made from figures alone.

What was not measured, and which controls are missing, is said in the same breath as what was.
"""

from collections.abc import Sequence

from distcond.config import HaltingKind
from distcond.report.gather import RunFacts, number
from distcond.report.tree_map import TreeMap
from distcond.report.words import large, percent, plural, show
from distcond.train.fits import cost_of


def verdict(run: RunFacts, runs: Sequence[RunFacts], trees: Sequence[TreeMap]) -> list[str]:
    """Three sentences about the first of the runs given, and the trees in it."""
    return [_quality(run), _computation(run, trees), _not_shown(run, runs)]


def quality_unit(run: RunFacts) -> str:
    """Of the figure a run is judged by."""
    return "bits per byte" if run.is_text else "sequences wrong"


def quality_text(run: RunFacts, value: float | None) -> str:
    """That figure in words."""
    return show(value) if run.is_text else percent(value)


def interval_text(run: RunFacts) -> str:
    """The interval of that figure in words, or that there is none."""
    if run.interval:
        return f"95% interval {' to '.join(quality_text(run, end) for end in run.interval)}"
    return "by the validation of its training; without an interval, for it was not evaluated"


def _quality(run: RunFacts) -> str:
    task = "held-out text" if run.is_text else f"held-out examples of {run.config.data.name}"
    if run.quality is None:
        return f"{run.name} has no figure of quality yet: no validation is in its metrics, and it was not evaluated."
    figure = f"{quality_text(run, run.quality)} {quality_unit(run)}"
    interval = interval_text(run)
    after = f"after {run.step:,} of {run.config.train.max_steps:,} updates"
    return f"{run.name} reaches {figure} on {task} {after} ({interval})."


def _computation(run: RunFacts, trees: Sequence[TreeMap]) -> str:
    element = "byte" if run.is_text else "element"
    cost = cost_of(run.config)
    if run.steps is None or run.macs is None:
        spent = f"How many ponder steps an {element} takes was not measured"
    elif run.ponders:
        most = cost.macs(run.most_steps)
        spent = (
            f"It executes {show(run.steps, 3)} ponder steps per {element} of {run.most_steps} allowed, {large(run.macs)} MACs, "
            f"{percent(1 - run.macs / most)} less than {run.most_steps} steps for everyone would take"
        )
    else:
        every = f"{plural(run.most_steps, 'step')} for every {element}"
        spent = f"It executes {every}, {large(run.macs)} MACs, so no computation is saved by halting"
    if not trees:
        return f"{spent}; its weights are dense: every {element} uses all of them."
    touched, of = sum(tree.path_numbers for tree in trees), sum(tree.numbers for tree in trees)
    return (
        f"{spent}; in each step its tree uses {large(touched)} of the {large(of)} weights that exist in it "
        f"({percent(touched / of)}), those of the {run.config.model.tree.depth + 1} nodes on a path."
    )


def _not_shown(run: RunFacts, runs: Sequence[RunFacts]) -> str:
    missing = _missing(run, runs)
    shown = _shown(run)
    if not missing:
        return f"{shown}All controls that this page knows of are there."
    return f"{shown}Not shown: {'; '.join(missing)}."


def _shown(run: RunFacts) -> str:
    """What the controls in the evaluation say."""
    return _against_text(run) + _fixed_text(run) + _shuffled_text(run)


def _against_text(run: RunFacts) -> str:
    """Beside the run that it was evaluated against."""
    other, found = run.evaluation.get("against"), difference(run)
    if not isinstance(other, dict) or found is None:
        return ""
    told = "better than" if found[2] < 0 else "worse than" if found[1] > 0 else "not told apart from"
    value, low, high = (signed_quality(run, part) for part in found)
    return f"It is {told} {other.get('run')}: {value} {quality_unit(run)} (95% interval {low} to {high}). "


def difference(run: RunFacts) -> tuple[float, float, float] | None:
    """Quality less that of the run that it was evaluated against, and its 95% interval."""
    value, low, high = (run.measured(f"against/difference{end}") for end in ("", "/low", "/high"))
    return None if value is None or low is None or high is None else (value, low, high)


def signed_quality(run: RunFacts, value: float) -> str:
    """A difference in quality in words."""
    return f"{'+' if value > 0 else '−' if value < 0 else ''}{quality_text(run, abs(value))}"


def _fixed_text(run: RunFacts) -> str:
    """The control beside what halting saves; empty where that is not known."""
    if (nearest := nearest_fixed(run)) is None:
        return ""
    figure = f"{quality_text(run, nearest[1])} {quality_unit(run)}"
    return f"With {plural(nearest[0], 'step')} forced on everyone the same model has {figure}. "


def nearest_fixed(run: RunFacts) -> tuple[int, float] | None:
    """The fixed number of steps nearest to what halting takes, and the quality with it, from the evaluation."""
    fixed, mean = fixed_steps(run), run.steps
    if not fixed or mean is None or not run.ponders:
        return None
    return min(fixed.items(), key=lambda item: abs(item[0] - mean))


def _shuffled_text(run: RunFacts) -> str:
    """Whether steps follow the loss, and whether they do so beyond what the place in a sequence decides."""
    rank, chance = run.measured("control/steps_loss_rank_correlation"), chance_of(run, "loss", "shuffled")
    if rank is None or chance is None:
        return ""
    told = f"(rank correlation {show(rank, 2)}, by chance {show(chance[0], 2)} to {show(chance[1], 2)})"
    if chance[0] <= rank <= chance[1]:
        return f"Steps follow the loss no more than shuffled ones do {told}. "
    text = f"More steps go where the loss is {'higher' if rank > chance[1] else 'lower'}, beyond what shuffled ones do {told}"
    stricter = chance_of(run, "loss", "at_equal_positions")
    if stricter is None:
        return f"{text}. "
    is_place = stricter[0] <= rank <= stricter[1]
    return f"{text}, {'but not' if is_place else 'and'} beyond what the place in a sequence decides. "


def chance_of(run: RunFacts, difficulty: str, way: str) -> tuple[float, float] | None:
    """Range of the rank correlation of steps that were shuffled in a way, the middle 95%, from the evaluation."""
    low, high = (run.measured(f"control/steps_{difficulty}_{way}_{end}") for end in ("low", "high"))
    return None if low is None or high is None else (low, high)


def _missing(run: RunFacts, runs: Sequence[RunFacts]) -> list[str]:
    halting = {other.config.model.halting.kind for other in runs}
    seeds = {str(other.config.seed) for other in runs if _is_same_but_seed(run, other)} | seeds_beside(run).keys()
    tests = (
        (not run.evaluation, "an evaluation (interval, latency, memory)"),
        (len(seeds) < 2, "whether another seed gives the same, for this is one"),
        (run.has_tree and all(other.has_tree for other in runs), "the same model without its tree"),
        (run.ponders and HaltingKind.none not in halting, "one step for everyone"),
        (run.ponders and not has_fixed(run, runs), "a fixed number of steps with the same mean, the control for halting"),
        (
            run.ponders and run.measured("control/steps_loss_rank_correlation") is None,
            "whether steps go with difficulty more than by chance",
        ),
    )
    return [text for is_missing, text in tests if is_missing]


def has_fixed(run: RunFacts, runs: Sequence[RunFacts]) -> bool:
    """Whether there is one with as many steps as the run takes on average, among the runs or in the evaluation."""
    fixed = [other.most_steps for other in runs if other.config.model.halting.kind == HaltingKind.fixed]
    return any(run.steps is not None and abs(steps - run.steps) <= 0.5 for steps in [*fixed, *fixed_steps(run)])


def fixed_steps(run: RunFacts) -> dict[int, float]:
    """Quality of the run by a number of steps that was forced on everyone, from the evaluation."""
    found = run.evaluation.get("control/fixed_steps")
    values = {key: number(found, key) for key in found if key.isdecimal()} if isinstance(found, dict) else {}
    return {int(key): value for key, value in values.items() if value is not None}


def _is_same_but_seed(run: RunFacts, other: RunFacts) -> bool:
    own, its = run.config, other.config
    return (own.model, own.data, own.optim) == (its.model, its.data, its.optim)


def seeds_beside(run: RunFacts) -> dict[str, float]:
    """Quality by seed of the runs that are this one but for the seed, from the evaluation."""
    found = run.evaluation.get("maintainability/seeds")
    seeds = {str(seed): value for seed, value in found.items() if isinstance(value, dict)} if isinstance(found, dict) else {}
    return {seed: quality for seed, value in seeds.items() if (quality := number(value, "quality")) is not None}
