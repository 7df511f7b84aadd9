"""Charts: escaped, with round numbers on their axes; and colours that can be read in both themes."""

import re

import pytest
from markupsafe import Markup

from distcond.report.charts import Bar, Curve, Dot, bars, columns, curves, scatter
from distcond.report.render import FOLDER
from distcond.report.svg import CLASSES, Axis, shade, tag


def test_what_is_not_markup_is_escaped_in_text_and_attributes() -> None:
    assert tag("g", "<b>", Markup("<i></i>"), data_tip='"><script>') == (
        '<g data-tip="&#34;&gt;&lt;script&gt;">&lt;b&gt;<i></i></g>'
    )
    assert "\x1b" not in tag("g", "\x1b", title="\x1b")


@pytest.mark.parametrize("values", [[0.0, 1.0], [2.1, 2.3], [5.0, 5.0], [0.0, 0.0], [-3.0, 1e6], [1e-9, 2e-9]])
def test_an_axis_holds_its_values_and_a_few_round_ticks(values: list[float]) -> None:
    axis = Axis.over(values, 50, 350)
    assert all(50 <= axis(value) <= 350 for value in values)
    assert 2 <= len(axis.ticks()) <= 7
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks())


def test_a_logarithmic_axis_has_equal_steps_for_equal_factors() -> None:
    axis = Axis.over([1.0, 1000.0], 0, 100, is_log=True)
    assert axis(10.0) - axis(1.0) == pytest.approx(axis(1000.0) - axis(100.0))
    assert 10.0 in axis.ticks()


def test_every_point_can_be_asked_for_its_numbers() -> None:
    drawn = curves("t", [Curve("train", [(1.0, 2.0), (2.0, 1.5)], "main"), Curve("none", [], "other")], "step", "bits")
    assert drawn.count("data-tip") == drawn.count("<circle") == 2 and "train\nstep 2\nbits 1.5" in drawn
    long = curves("t", [Curve("train", [(float(step), 0.0) for step in range(10_000)], "main")], "step", "bits")
    assert 120 < long.count("<circle") <= 240 and "step 9,999" in long


def test_the_front_is_told_by_shape_too() -> None:
    dots = [Dot(1.0, 2.0, "first", "1", True, 1.9, 2.1), Dot(2.0, 3.0, "second", "2", False)]
    drawn = scatter("t", dots, "MACs", "bits")
    assert drawn.count("<circle") == 1 and drawn.count('<rect class="mark') + drawn.count("data-tip") == 2
    assert drawn.count('class="interval') == 1


def test_bars_below_zero_go_to_the_left() -> None:
    drawn = bars("t", [Bar("a", -1.0, ""), Bar("b", 1.0, "")], "bits")
    left, right = (float(x) for x in re.findall(r'class="mark bar" x="([\d.]+)"', drawn))
    assert left < right
    assert columns("t", [("1", 0.5, "half")], "x", "y").count("half") == 1


def test_shades_cover_the_scale() -> None:
    assert [shade(value, 0.0, 1.0) for value in (-1.0, 0.0, 0.5, 1.0, 2.0)] == [0, 0, CLASSES // 2, CLASSES - 1, CLASSES - 1]
    assert shade(1.0, 1.0, 1.0) == 0


# ---- colours ---------------------------------------------------------------------------------------------------------

TEXTS = [
    *(("ink", ground) for ground in ("paper", "card", "box", "steps", "loss", "entropy")),
    *(("soft", ground) for ground in ("paper", "card", "box")),
    *(("main", ground) for ground in ("paper", "card")),
    *(("warn", ground) for ground in ("warn-paper", "card")),
    ("paper", "ink"),
]
DRAWN = [*((line, "card") for line in ("main", "second", "other", "root")), ("focus", "paper")]


def _colours(theme: str) -> dict[str, str]:
    style = (FOLDER / "style.css").read_text()
    parts = re.findall(r":root \{(.*?)\}", style, re.DOTALL)  # dark replaces what differs from light
    names = [dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in parts]
    return names[0] if theme == "light" else names[0] | names[1]


def _luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _contrast(first: str, second: str) -> float:
    low, high = sorted(map(_luminance, (first, second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast_is_that_of_wcag_aa(theme: str) -> None:
    """4.5 for text, 3 for what is drawn (WCAG 2.2, 1.4.3 and 1.4.11)."""
    colours = _colours(theme)
    short = [(a, b, round(_contrast(colours[a], colours[b]), 2)) for a, b in TEXTS if _contrast(colours[a], colours[b]) < 4.5]
    short += [(a, b, round(_contrast(colours[a], colours[b]), 2)) for a, b in DRAWN if _contrast(colours[a], colours[b]) < 3]
    assert short == []
