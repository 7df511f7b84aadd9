"""Elements of SVG, axes with round numbers, and the classes that colour them: what every chart is made of.

A chart is 360 units wide, so that on a telephone a unit is a pixel. Whatever a mark has to tell is in its `data-tip`, which the
script shows at a pointer or the keyboard; colours come from style.css alone.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from distcond.report.words import visible

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 12, 40
CLASSES = 9
"Shades of a colour scale."


def tag(_name: str, *children: str, **attributes: object) -> Markup:
    """An element; what is not Markup is escaped. `class_` is class, an underscore in a name a hyphen."""
    written = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), plain(value))
        for key, value in attributes.items()
        if value is not None
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(_name), written, Markup("").join(map(escape, map(plain, children))))


def plain(value: object) -> object:
    """As it is written: numbers short, and of a text that is not Markup everything visible."""
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def chart(*children: str, title: str, height: int = HEIGHT) -> Markup:
    """A chart that is one stop of the keyboard; arrows then go from mark to mark."""
    return tag(
        "svg",
        tag("title", title),
        *children,
        class_="chart",
        viewBox=f"0 0 {WIDTH} {height}",
        role="img",
        aria_label=title,
        tabindex="0",
        data_marks="",
    )


@dataclass(frozen=True, slots=True)
class Axis:
    """A scale from numbers to units of the chart."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    @classmethod
    def over(cls, values: Iterable[float], start: float, end: float, *, from_zero: bool = False, is_log: bool = False) -> "Axis":
        """Over all of some finite numbers, and a little more."""
        known = list(values) or [0.0, 1.0]
        low, high = min(known), max(known)
        if is_log and low > 0:
            return cls(low / 1.15, high * 1.15, start, end, is_log=True)
        low = min(0.0, low) if from_zero else low
        room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        return cls(low if from_zero and low >= 0 else low - room, high + room, start, end)

    def __call__(self, value: float) -> float:
        """Where a number is."""
        low, high, value = (
            (math.log(part) for part in (self.low, self.high, value)) if self.is_log else (self.low, self.high, value)
        )
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, most: int = 5) -> list[float]:
        """Round numbers between the ends."""
        if self.is_log and self.high / self.low > 8:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
            return [tick for tick in found if self.low <= tick <= self.high][: 2 * most]
        rough = (self.high - self.low) / most
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * size for factor in (1, 2, 5, 10) if factor * size >= rough)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [number * step for number in range(first, last + 1)]


def axes(x: Axis, y: Axis, x_label: str, y_label: str) -> Markup:
    """Grid, numbers and names of both axes."""
    parts = []
    for tick in y.ticks():
        parts.append(tag("line", class_="grid", x1=x.start, x2=x.end, y1=y(tick), y2=y(tick)))
        parts.append(tag("text", tick_text(tick), class_="tick", x=x.start - 6, y=y(tick) + 4, text_anchor="end"))
    for tick in x.ticks(4):
        parts.append(tag("text", tick_text(tick), class_="tick", x=x(tick), y=y.start + 16, text_anchor="middle"))
    parts.append(tag("line", class_="axis", x1=x.start, x2=x.end, y1=y.start, y2=y.start))
    parts.append(tag("text", x_label, class_="label", x=(x.start + x.end) / 2, y=y.start + 33, text_anchor="middle"))
    parts.append(tag("text", y_label, class_="label", x=4, y=10))
    return Markup("").join(parts)


def tick_text(value: float) -> str:
    """A round number, short."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * (10 if letter == "k" else 1):
            return f"{value / size:.3g}{letter}"
    return f"{value:.4g}"


def points(places: Sequence[tuple[float, float]]) -> str:
    """The `points` of a polyline."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def shade(value: float, low: float, high: float) -> int:
    """0 to CLASSES - 1, by where a number is between two others."""
    share = (value - low) / (high - low) if high > low else 0.0
    return min(CLASSES - 1, max(0, int(share * CLASSES)))
