"""The page in a real browser: no complaint, no request, tables sort, keys and pointers tell numbers."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from distcond.report import report
from tests.report.browser import Browser, browser, find_chromium
from tests.report.conftest import CHANCE, EVALUATION

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_chromium() is None, reason="no chromium here")]

SIZES = {"wide": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844, "phone": True}}


@pytest.fixture(scope="module", name="page")
def make_page(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With every section: of a run that grew and was evaluated, beside its parent."""
    folder = tmp_path_factory.mktemp("browser")
    runs = [Path(shutil.copytree(family / name, folder / name)) for name in ("grown", "dense")]
    (runs[0] / "eval").mkdir(exist_ok=True)
    (runs[0] / "eval/step_00000003.json").write_text(json.dumps(EVALUATION | CHANCE))
    page = report(runs, folder / "page.html")
    text = page.read_text()
    assert all(f">{title}</h" in text for title in ("Before and after", "Evaluated against other", "Halting beside fixed steps"))
    return page


@pytest.fixture(scope="module", name="chromium")
def start_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


def hidden(chromium: Browser) -> bool:
    return bool(chromium.run("document.getElementById('tip').hidden"))


def tip(chromium: Browser) -> str:
    return str(chromium.run("document.getElementById('tip').hidden ? '' : document.getElementById('tip').textContent"))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_it_opens_without_complaint_or_request_and_fits(size: str, dark: bool, page: Path, chromium: Browser) -> None:
    chromium.open(page, **SIZES[size], dark=dark)
    assert chromium.complaints() == []
    assert chromium.run("document.documentElement.scrollWidth <= innerWidth")
    ground = chromium.run("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(20, 23, 27)") == dark
    sizes = "[...document.querySelectorAll('p, td, th, svg text, dd, i')].map((e) => parseFloat(getComputedStyle(e).fontSize))"
    assert min(chromium.run(sizes)) >= 11


def test_a_click_on_a_header_sorts_and_another_one_turns_around(page: Path, chromium: Browser) -> None:
    chromium.open(page, **SIZES["wide"])
    # The table of levels, by the mean norm: the only one with a column of that name.
    column = (
        "(() => { const head = [...document.querySelectorAll('th')].find((th) => th.textContent === 'mean norm'); "
        "return [...head.closest('table').tBodies[0].rows].map((row) => Number(row.cells[head.cellIndex].dataset.v)); })()"
    )
    place = (
        "(() => { const button = [...document.querySelectorAll('th button')].find((b) => b.textContent === 'mean norm'); "
        "button.scrollIntoView({block: 'center'}); const box = button.getBoundingClientRect(); "
        "return [box.left + box.width / 2, box.top + box.height / 2]; })()"
    )
    before = chromium.run(column)
    assert before != sorted(before)
    for turned in (False, True):
        chromium.point(*chromium.run(place), click=True)
        assert chromium.run(column) == sorted(before, reverse=turned)
        assert chromium.run("document.querySelectorAll('th[aria-sort]').length") == 1
    chromium.run("[...document.querySelectorAll('th button')].find((b) => b.textContent === 'level').focus()")
    chromium.press("Enter")
    assert chromium.run(column) == before
    assert chromium.complaints() == []


def test_keys_go_from_mark_to_mark_and_every_stop_is_seen(page: Path, chromium: Browser) -> None:
    chromium.open(page, **SIZES["wide"])
    stops = []
    for _ in range(200):
        chromium.press("Tab")
        stops.append(chromium.run("document.activeElement.className?.baseVal ?? document.activeElement.className"))
        if chromium.run("document.activeElement === document.body"):
            break
        seen = chromium.run("getComputedStyle(document.activeElement).outlineStyle")
        assert seen != "none", stops[-1]
    assert stops[0] == "skip" and {"chart", "icicle", "text", "scroll"} <= set(stops)
    chromium.run("document.querySelector('svg.icicle').focus()")
    chromium.press("ArrowRight")
    assert tip(chromium).startswith("node root\nlevel 0")
    chromium.press("ArrowDown")
    assert "level 1" in tip(chromium)
    chromium.press("Escape")
    assert hidden(chromium)
    chromium.run("document.querySelector('.text').focus()")
    chromium.press("End")
    assert tip(chromium).startswith("byte ") and "entropy" in tip(chromium)
    copies = chromium.run("document.querySelectorAll('.text').length")  # steps, loss, entropy, but steps only where they differ
    assert chromium.run("document.querySelectorAll('.text i.now').length") == copies >= 2
    assert chromium.complaints() == []


@pytest.mark.parametrize("size", SIZES)
def test_a_pointer_tells_the_numbers_of_what_is_under_it(size: str, page: Path, chromium: Browser) -> None:
    chromium.open(page, **SIZES[size])
    for selector, told in (
        (".text i:nth-of-type(5)", "byte "),
        (".icicle .box", "node root"),
        ("svg.chart circle.second", "val/bpb"),
    ):
        place = chromium.run(
            f"(() => {{ const mark = document.querySelector('{selector}'); mark.scrollIntoView({{block: 'center'}}); "
            "const box = mark.getBoundingClientRect(); return [box.left + box.width / 2, box.top + box.height / 2]; })()"
        )
        chromium.point(*place)
        assert told in tip(chromium), selector
        box = chromium.run(
            "(() => { const box = document.getElementById('tip').getBoundingClientRect(); return [box.left, box.right]; })()"
        )
        assert 0 <= box[0] < box[1] <= SIZES[size]["width"]
    chromium.point(1, 1)
    assert hidden(chromium)
    assert chromium.complaints() == []
