"""The charts of the page: curves, quality against computation, bars. Each says in words what it shows, for those who listen."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from distcond.report.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, axes, chart, points, tag
from distcond.report.words import show

MOST_POINTS = 240
"Of a curve; more cannot be told apart."


@dataclass(frozen=True, slots=True)
class Curve:
    """A line of a chart."""

    name: str
    points: list[tuple[float, float]]
    "(x, y), ascending in x."
    style: str
    "Its class: main, second, or other for runs in the background."


@dataclass(frozen=True, slots=True)
class Dot:
    """A point of a scatter plot."""

    x: float
    y: float
    tip: str
    label: str
    "Shown beside it; the table below says what that is."
    is_front: bool
    low: float | None = None
    high: float | None = None
    "Interval of y."


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar with its label on the left."""

    label: str
    value: float
    tip: str


def curves(title: str, lines: Sequence[Curve], x_label: str, y_label: str) -> Markup:
    """Lines over a common x, the main one on top; points are marks."""
    known = [_thinned(line) for line in lines if line.points]
    x = Axis.over((px for line in known for px, _ in line.points), LEFT, WIDTH - RIGHT, from_zero=True)
    y = Axis.over((py for line in known for _, py in line.points), HEIGHT - BOTTOM, TOP + 8)
    parts = []
    for line in sorted(known, key=lambda line: ("other", "second", "main").index(line.style)):
        places = [(x(px), y(py)) for px, py in line.points]
        parts.append(tag("polyline", class_=f"curve {line.style}", points=points(places)))
        for (px, py), (left, top) in zip(line.points, places, strict=True):
            tip = f"{line.name}\n{x_label} {show(px)}\n{y_label} {show(py)}"
            size = 2.4 if line.style == "second" else 1.6
            parts.append(tag("circle", class_=f"mark {line.style}", cx=left, cy=top, r=size, data_tip=tip))
    return chart(axes(x, y, x_label, y_label), *parts, title=title)


def _thinned(line: Curve) -> Curve:
    """At most about MOST_POINTS points, the last one among them."""
    stride = -(-len(line.points) // MOST_POINTS)
    return Curve(line.name, line.points[::-1][::stride][::-1], line.style)


def scatter(title: str, dots: Sequence[Dot], x_label: str, y_label: str) -> Markup:
    """Dots with intervals and numbers; a stepped line joins those that no other dot beats in both."""
    spread = [end for dot in dots for end in (dot.y, dot.low, dot.high) if end is not None]
    wide = min(dot.x for dot in dots) > 0
    x = Axis.over((dot.x for dot in dots), LEFT, WIDTH - RIGHT - 12, is_log=wide)
    y = Axis.over(spread, HEIGHT - BOTTOM, TOP + 8)
    front = sorted((x(dot.x), y(dot.y)) for dot in dots if dot.is_front)
    corners = [place for before, after in itertools.pairwise(front) for place in ((after[0], before[1]), after)]
    parts = [tag("polyline", class_="front", points=points(front[:1] + corners))]
    for dot in dots:
        left, top, style = x(dot.x), y(dot.y), "main" if dot.is_front else "other"
        if dot.low is not None and dot.high is not None:
            parts.append(tag("line", class_=f"interval {style}", x1=left, x2=left, y1=y(dot.low), y2=y(dot.high)))
        mark = {"class_": f"mark {style}", "data_tip": dot.tip}
        if dot.is_front:
            parts.append(tag("circle", cx=left, cy=top, r=5, **mark))
        else:
            parts.append(tag("rect", x=left - 4, y=top - 4, width=8, height=8, **mark))
        parts.append(tag("text", dot.label, class_="number", x=left + 8, y=top + 4))
    return chart(axes(x, y, x_label, y_label), *parts, title=title)


def bars(title: str, rows: Sequence[Bar], unit: str) -> Markup:
    """Horizontal bars with their numbers; those below zero go to the left."""
    label_width, pitch = 112, 22
    height = TOP + pitch * len(rows) + 22
    low, high = min(0.0, *(row.value for row in rows)), max(0.0, *(row.value for row in rows))
    x = Axis(low, high or low + 1.0, label_width + (58 if low < 0 else 0), WIDTH - 62)
    parts = []
    for place, row in enumerate(rows):
        top = TOP + pitch * place
        left, right = sorted((x(0.0), x(row.value)))
        end = right + 5 if row.value >= 0 else left - 5
        parts += [
            tag("text", row.label, class_="tick", x=label_width - 6, y=top + 12, text_anchor="end"),
            tag("rect", class_="mark bar", x=left, y=top, width=max(right - left, 1.0), height=pitch - 6, data_tip=row.tip),
            tag("text", show(row.value, 3), class_="value", x=end, y=top + 12, text_anchor="start" if row.value >= 0 else "end"),
        ]
    parts.append(tag("line", class_="axis", x1=x(0.0), x2=x(0.0), y1=TOP - 4, y2=height - 22))
    parts.append(tag("text", unit, class_="label", x=x(0.0), y=height - 6))
    return chart(*parts, title=title, height=height)


def columns(title: str, values: Sequence[tuple[str, float, str]], x_label: str, y_label: str) -> Markup:
    """Upright bars from zero: label, height and tip of each."""
    y = Axis.over((value for _, value, _ in values), HEIGHT - BOTTOM, TOP + 8, from_zero=True)
    x = Axis(0.0, float(len(values)), LEFT, WIDTH - RIGHT)
    pitch, every = (WIDTH - RIGHT - LEFT) / len(values), -(-len(values) // 12)
    parts = []
    for place, (label, value, tip) in enumerate(values):
        size = {"x": x(place + 0.1), "width": 0.8 * pitch, "y": y(value), "height": max(y(0.0) - y(value), 0.5)}
        parts.append(tag("rect", class_="mark bar", data_tip=tip, **size))
        if place % every == 0:
            parts.append(tag("text", label, class_="tick", x=x(place + 0.5), y=HEIGHT - BOTTOM + 16, text_anchor="middle"))
    bare = Axis(0.0, 1.0, LEFT, WIDTH - RIGHT)
    ticks = _y_axis(y, bare)
    ticks.append(tag("text", x_label, class_="label", x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 7, text_anchor="middle"))
    ticks.append(tag("text", y_label, class_="label", x=4, y=10))
    return chart(*ticks, *parts, title=title)


def _y_axis(y: Axis, x: Axis) -> list[Markup]:
    parts = [tag("line", class_="axis", x1=x.start, x2=x.end, y1=y.start, y2=y.start)]
    for tick in y.ticks():
        parts.append(tag("line", class_="grid", x1=x.start, x2=x.end, y1=y(tick), y2=y(tick)))
        parts.append(tag("text", f"{tick:.4g}", class_="tick", x=x.start - 6, y=y(tick) + 4, text_anchor="end"))
    return parts
