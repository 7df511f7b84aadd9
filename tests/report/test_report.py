"""`distcond report`: a page that says what the files say, holds nothing that acts, and refuses what it cannot read."""

import base64
import hashlib
import json
import math
import re
import shlex
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from distcond.cli import main
from distcond.compose import compose, load_config, save_config
from distcond.config import Config
from distcond.opened import open_run
from distcond.report import report
from distcond.report.gather import read_run
from distcond.report.probe import probe
from distcond.report.tables import quadrants
from distcond.report.verdict import verdict
from distcond.train.checkpoint import DENSE, MANIFEST, STATE, fingerprint
from distcond.train.run_folder import RunFolder
from tests.helpers import changed

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(1)">\x1b[2J\u202e'
ELEMENTS = {
    *("html", "head", "meta", "link", "title", "style", "body", "a", "header", "h1", "h2", "h3", "p", "nav", "ul", "ol", "li"),
    *("main", "section", "article", "div", "span", "dl", "dt", "dd", "figure", "figcaption", "strong", "code", "pre", "details"),
    *("svg", "text", "line", "polyline", "circle", "rect", "table", "thead", "tbody", "tr", "th", "td", "button", "summary"),
    *("fieldset", "legend", "label", "input", "i", "b", "br", "hr", "footer", "script"),
}


def path_of(config: Config) -> Path:
    return Path(config.run.dir) / config.run.name


@pytest.fixture
def copied(text_run: Config, tmp_path: Path) -> Callable[[str], Path]:
    """Makes a copy of a finished run that a test may change."""

    def copy(name: str) -> Path:
        shutil.copytree(path_of(text_run), tmp_path / name)
        return tmp_path / name

    return copy


class Page(HTMLParser):
    """What a browser would make of a page: elements, their attributes, their text."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module", name="page_file")
def make_page(text_run: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report([path_of(text_run)], tmp_path_factory.mktemp("report") / "page.html")


def test_the_page_holds_every_section_and_needs_nothing_from_elsewhere(page_file: Path) -> None:
    page = Page(page_file)
    assert len(page.all("h1")) == len(page.all("main")) == len(page.all("nav")) == 1
    ids = {attributes.get("id") for _, attributes in page.elements}
    assert {"verdict", "learning", "compare", "computation", "tree", "samples", "settings"} <= ids
    links = {attributes[key] or "" for _, attributes in page.elements for key in ("href", "src") if key in attributes}
    assert all(link.removeprefix("#") in ids or link == "data:," for link in links) and len(links) >= 7
    assert not re.findall(r"https?://|@import|url\(", re.sub(r"<pre.*?</pre>", "", page_file.read_text(), flags=re.DOTALL))
    assert page_file.stat().st_size < 3e6
    assert all(attributes.get("aria-label") for attributes in page.all("svg"))


def test_the_policy_lets_our_script_and_style_run_and_no_others(page_file: Path) -> None:
    text = page_file.read_text(encoding="utf-8")
    (policy,) = (meta["content"] for meta in Page(page_file).all("meta") if meta.get("http-equiv"))
    assert policy and "unsafe" not in policy and "default-src 'none'" in policy
    for tag in ("script", "style"):
        (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'" in policy
    assert not any("style" in attributes for _, attributes in Page(page_file).elements)


def test_the_look_at_the_model_is_the_last_validation(text_run: Config) -> None:
    """The probe sees all of a small validation set."""
    opened = open_run(path_of(text_run))
    seen = probe(opened.learner, opened.feeder.task, text_run.data.validation_examples)
    positions = seen.positions
    last = [row for row in read_run(path_of(text_run)).rows if "val/bpb" in row][-1]
    assert positions.nll.size == text_run.data.validation_examples * text_run.data.context
    assert positions.loss_bits.mean() == pytest.approx(last["val/bpb"], rel=1e-5)  # fp32, summed in other batches
    assert positions.steps.mean() == pytest.approx(last["val/ponder/steps"])
    assert positions.wrong.mean() == pytest.approx(last["val/element_error"])
    (use,) = seen.layers.values()
    assert int(use.count_V.sum()) == positions.steps.sum() and use.first_leaf_BTM is not None


def test_the_verdict_says_what_is_not_known(text_run: Config, copied: Callable[[str], Path]) -> None:
    run = read_run(path_of(text_run))
    quality, spent, missing = verdict(run, [run], [])
    assert f"{run.quality:.4g} bits per byte" in quality and "without an interval, for it was not evaluated" in quality
    assert "of 4 allowed" in spent and "its weights are dense" in spent
    assert "Not shown: an evaluation" in missing and "the control for halting" in missing
    folder = copied("run")
    figures = {"val/bpb": 2.0, "val/bpb/low": 1.9, "val/bpb/high": 2.1, "control/steps_loss_rank_correlation": 0.5}
    figures |= {"control/steps_loss_shuffled_low": -0.1, "control/steps_loss_shuffled_high": 0.1, "control/fixed_steps": {}}
    fixed = {"1": 3.0, "2": 2.5, "3": 2.25, "4": 2.2}
    (folder / "eval/step_00000012.json").write_text(
        json.dumps({**figures, "control/fixed_steps": fixed, "val/ponder/steps": 2.6})
    )
    run = read_run(folder)
    quality, spent, missing = verdict(run, [run], [])
    assert "reaches 2 bits per byte" in quality and "95% interval 1.9 to 2.1" in quality and "2.6 ponder steps" in spent
    assert missing.startswith(
        "With 3 steps forced on everyone the same model has 2.25 bits per byte. More steps go where the loss is higher"
    )
    assert "evaluation" not in missing and "control for halting" not in missing


def test_a_missing_cell_names_the_command_that_fills_it(text_run: Config) -> None:
    run = read_run(path_of(text_run))
    (dense, dense_act), (tree, both) = quadrants([run])
    assert both.runs and not both.command and not (dense.runs or dense_act.runs or tree.runs)
    wanted = {"model.tree.depth=0": (dense, dense_act), "model.halting.kind=none": (dense, tree)}
    for words, cells in wanted.items():
        assert [words in cell.command for cell in (dense, dense_act, tree)] == [
            cell in cells for cell in (dense, dense_act, tree)
        ]
    again = compose(shlex.split(dense.command)[2:])
    assert (again.model.tree.depth, again.model.halting.kind, again.data) == (0, "none", run.config.data)


@pytest.mark.thorough
def test_several_runs_stand_beside_each_other(text_run: Config, copied: Callable[[str], Path], tmp_path: Path) -> None:
    other = copied("other")
    save_config(changed(load_config(other / "config.yaml"), run__name="other", seed=1), other / "config.yaml")
    page = Page(report([path_of(text_run), other], tmp_path / "two.html"))
    assert "Beside 1 other run" in page.text and "whether another seed" not in page.text
    assert sum((tip or "").startswith(("1: run", "2: other")) for tip in (a.get("data-tip") for _, a in page.elements)) == 2


# ---- strangers' files ------------------------------------------------------------------------------------------------


def test_nothing_in_a_run_becomes_markup(copied: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied("<img src=x onerror=alert(1)>")
    corpus = tmp_path / "<i>"
    corpus.mkdir()
    (corpus / "a.txt").write_bytes((HOSTILE.encode(errors="surrogatepass") + b"\x00\xff\t\n&lt;") * 60)
    config = load_config(folder / "config.yaml")
    name = "<img src=x onerror=alert(1)>"
    config = changed(config, run__name=name, data__files=[str(corpus / "a.txt")], data__cache_dir=str(tmp_path / "cache"))
    config = changed(config, train__init_from=f"{tmp_path}/{name}")
    save_config(config, folder / "config.yaml")
    sample = {"input": HOSTILE, "target": "a" * len(HOSTILE), "prediction": HOSTILE, "wrong": HOSTILE, "steps": [HOSTILE]}
    samples = [sample, {"target": {HOSTILE: 1}, "prediction": [HOSTILE]}, HOSTILE]
    (folder / "eval/samples.jsonl").write_text(json.dumps({"step": 12, "samples": samples}) + "\n")
    (folder / "environment.json").write_text(json.dumps({HOSTILE: {HOSTILE: [HOSTILE, "\ud800"]}}))
    figures = {
        "val/bpb": HOSTILE,
        "maintainability/seeds": {HOSTILE: {"quality": 1.0}},
        "val/bpb/low": 1e400,
        "control/fixed_steps": {"\u00b2": 1.0},
        "val/ponder/steps_histogram": [HOSTILE],
        "against": {"run": HOSTILE, "step": HOSTILE, "val/bpb": HOSTILE, "latency_ms/batch_1/p50": 1.0},
    }
    (folder / "eval/step_00000012.json").write_text(json.dumps(figures))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 12, "train/bpb": HOSTILE, HOSTILE: 1.0, "optim/grad_norm": float("nan")}) + "\n")
    file = report([folder])
    assert file == folder / "report.html"
    page = Page(file)
    assert {tag for tag, _ in page.elements} <= ELEMENTS and len(page.all("script")) == 1
    assert not [key for _, attributes in page.elements for key in attributes if key.startswith("on") or key in {"src", "style"}]
    text = file.read_text(encoding="utf-8")
    assert not [letter for letter in text if not letter.isprintable() and letter != "\n"]
    assert f"distcond evaluate {shlex.quote(str(folder))}" in page.text
    assert "alert(1)" in page.text and "␛[2J‹202E›" in page.text and "‹FF›" in page.text


def test_samples_that_are_none_are_left_out(copied: Callable[[str], Path]) -> None:
    folder = copied("none")
    (folder / "eval/samples.jsonl").write_text('{"step": 12, "samples": 7}\n')
    assert read_run(folder).samples == []


def refused(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    assert main(["report", *map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


def test_a_place_where_no_file_can_be_is_refused(text_run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = path_of(text_run)
    assert "is not a folder; create it first" in refused(capsys, run, "--out", tmp_path / "no/page.html")
    assert "is a folder; give a file in it" in refused(capsys, run, "--out", tmp_path)
    assert "is not a run folder" in refused(capsys, run, tmp_path)


def _older(folder: Path) -> None:
    checkpoint = folder / "checkpoints/step_00000012"
    state = {**json.loads((checkpoint / STATE).read_text()), "format_version": 0}
    (checkpoint / STATE).write_text(json.dumps(state))
    _seal(checkpoint, STATE)


def _seal(checkpoint: Path, name: str) -> None:
    """Make a changed file part of the checkpoint."""
    manifest = {**json.loads((checkpoint / MANIFEST).read_text()), name: fingerprint(checkpoint / name)}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


def _write(name: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(text)


def _change(**changes: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        save_config(changed(load_config(folder / "config.yaml"), **changes), folder / "config.yaml")

    return change


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no checkpoints": (lambda folder: shutil.rmtree(folder / "checkpoints"), "has no checkpoint yet"),
    "older format": (_older, "has format 0; this version reads"),
    "older keys": (_write("config.yaml", "model:\n  depth_of_tree: 3\n"), "depth_of_tree"),
    "damaged checkpoints": (
        lambda f: [file.write_bytes(b"x") for file in f.glob("checkpoints/*/dense*")],
        "is damaged or missing",
    ),
    "damaged metrics": (_write("metrics.jsonl", "{}\n"), "metrics.jsonl, line 1, is damaged (it is no JSON object with a step)"),
    "metrics of bytes": (lambda folder: (folder / "metrics.jsonl").write_bytes(b"\xff\xfe\n"), "is damaged (it is no JSON)"),
    "damaged evaluation": (_write("eval/step_00000012.json", "[]"), "step_00000012.json is damaged"),
    "damaged environment": (_write("environment.json", "{"), "environment.json is damaged"),
    "other data": (_change(data__context=8), "data.context=16, "),
    "another text": (
        _write("environment.json", '{"data": {"validation": {"sha256": "0"}}}'),
        "were validated on different texts",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_run_that_cannot_be_read_or_compared_is_refused_in_one_line(
    case: str, text_run: Config, copied: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, (spoil, told) = copied("bad"), BAD[case]
    spoil(folder)
    assert told in refused(capsys, path_of(text_run), folder)
    assert not (path_of(text_run) / "report.html").exists()


def test_a_run_that_goes_on_is_refused(copied: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied("busy")
    with RunFolder(folder).locked():
        assert "is still being written" in refused(capsys, folder)


def test_a_model_of_nan_is_refused(copied: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied("nan")
    checkpoint = folder / "checkpoints/step_00000012"
    tensors = load_file(checkpoint / DENSE)
    tensors["body.head.bias/weight"][:] = math.nan
    save_file(tensors, checkpoint / DENSE)
    _seal(checkpoint, DENSE)
    assert "answers with NaN or infinity" in refused(capsys, folder)
    assert main(["export", str(folder), "--out", str(folder / "model")]) == 2  # nor is it exported, or evaluated as numbers
    assert "the model answers with numbers that are NaN or infinite" in capsys.readouterr().err
    assert not (folder / "model").exists()
