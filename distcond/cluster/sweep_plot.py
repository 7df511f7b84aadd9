"""The trials of a sweep as a picture: quality against executed computation, with the Pareto front."""

from collections.abc import Sequence
from pathlib import Path

from distcond.cluster.sweep_report import STEPS, Outcome, Status, best

PLOT_FILE = "pareto.png"


def plot(file: Path, name: str, quality: str, outcomes: Sequence[Outcome]) -> bool:
    """Write the picture; returns whether there was anything to show."""
    judged = [(o.status, o.ponder_steps, o.quality) for o in outcomes if o.quality is not None and o.ponder_steps is not None]
    if not judged:
        return False
    # NOTE: imported here, for it takes a second; a figure of its own, so that no window system is asked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    front = best(outcomes)
    for status, marker in ((Status.finished, "o"), (Status.stopped, "x"), (Status.failed, "v")):
        points = [(steps, value) for ended, steps, value in judged if ended == status]
        color = "tab:blue" if status == Status.finished else "tab:gray"
        axes.scatter([x for x, _ in points], [y for _, y in points], marker=marker, color=color, label=status.value)
    line = [(outcome.ponder_steps or 0.0, outcome.quality or 0.0) for outcome in front]
    axes.plot([x for x, _ in line], [y for _, y in line], drawstyle="steps-post", color="tab:orange", zorder=0)
    for outcome in front:
        label = ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in outcome.overrides.items())
        axes.annotate(
            label, (outcome.ponder_steps or 0.0, outcome.quality or 0.0), textcoords="offset points", xytext=(5, 5), fontsize=8
        )
    axes.set_xlabel(f"{STEPS}: executed ponder steps a position")
    axes.set_ylabel(f"{quality}, smaller is better")
    axes.set_title(f"{name}: line, no other trial is both better and cheaper", fontsize=10)
    axes.legend(fontsize=8)
    FigureCanvasAgg(figure).print_png(str(file))
    return True
