"""distcond explain: parts that sum to the whole, and changes that are what the model does when it is changed."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distcond.cli import main
from distcond.config import Config
from distcond.config.shape import TaskShape
from distcond.deploy.attribution import attribute
from distcond.deploy.changes import Change, Flip, run_changed
from distcond.deploy.explain import explain, explain_position, question_of, read_input
from distcond.deploy.served import Served
from distcond.deploy.stability import adjusted_rand, region_of
from distcond.errors import DataError
from distcond.nn import FixedComputation, TreeLinear
from tests.deploy.models import TEXT, VECTORS, inputs_for, model_config, random_model, tree_of
from tests.trees import random_tree, tokens

# fp32 outputs of size 1 beside sums in fp64; the figure.
EXACT = {"rtol": 0, "atol": 1e-5}
# Rows of one batch that were computed alike: not every BLAS sums each in the same order. A flip changes them by over 1e-3.
SAME = {"rtol": 0, "atol": 1e-6}
LOW: dict[str, Any] = {"full_depth": 1, "rank": 2}


# ---- attribution -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, LOW, {"num_trees": 2, "bias": False}, {"full_depth": 0, "rank": 1, "num_trees": 4}])
@pytest.mark.parametrize(
    "gate", [{"gate": "linear"}, {"gate": "sign"}, {"gate_gradient": "magnitude"}, {"gate_gradient": "flip"}]
)
@pytest.mark.parametrize("storage", ["dense", "lazy", "host"])
def test_the_parts_sum_to_the_output(storage: str, gate: dict[str, Any], options: dict[str, Any]) -> None:
    layer = random_tree(3, sizes=(16, 8), storage=storage, dtype=torch.float32, **gate, **options).eval()
    x = tokens(12, 16).float()
    parts = attribute(layer, x)
    torch.testing.assert_close(parts.output, layer(x).detach().double(), **EXACT)
    shares = parts.shares(parts.matrix_TMLP) + parts.shares(parts.bias_TMLP)
    torch.testing.assert_close(shares.sum((1, 2)), torch.ones(12, dtype=torch.float64))


def test_a_part_is_the_node_times_the_input() -> None:
    layer, x = random_tree(3), tokens(1)
    leaf = int(layer.leaf(x))
    parts = attribute(layer, x)
    for level in range(4):
        node = 2**level - 1 + (leaf >> (3 - level))
        torch.testing.assert_close(parts.matrix_TMLP[0, 0, level], layer.node_weight(node) @ x[0])
        torch.testing.assert_close(parts.bias_TMLP[0, 0, level], layer.node_bias(node))


def test_missing_nodes_add_nothing() -> None:
    layer = TreeLinear(5, 4, 40, full_depth=1, rank=1, storage="lazy").double()
    parts = attribute(layer, tokens(3))
    assert parts.matrix_TMLP[:, :, 1:].abs().max() == 0 and parts.matrix_TMLP.shape == (3, 1, 41, 4)
    torch.testing.assert_close(parts.output, layer(tokens(3)).detach())


# ---- changes ---------------------------------------------------------------------------------------------------------

MODELS = [(TEXT, "transformer"), (TEXT, "mlp"), (TEXT, "rnn"), (VECTORS, "rnn"), (VECTORS, "mlp")]


@pytest.mark.parametrize("halting", ["none", "fixed", "act", "ponder"])
@pytest.mark.parametrize(("shape", "name"), MODELS)
def test_nothing_changed_is_the_model_and_a_flip_gives_the_other_leaf(shape: TaskShape, name: str, halting: str) -> None:
    model = random_model(model_config(name, halting), shape)
    layer, sequence, position = tree_of(model), inputs_for(shape)[0][0], shape.max_length - 2
    logits, stats = model(sequence[None])
    flips = [Flip(1, 0, level) for level in (1, 2, 3)]
    same, *others = run_changed(model.body, layer, sequence, position, [Change(), *map(Change, flips)])
    # Four copies in a batch, else the same work.
    torch.testing.assert_close(same.logits, logits[0, position], **EXACT)
    assert same.steps == int(stats.steps[position]) == len(same.inputs)
    leaf = int(layer.leaf(same.inputs[0]))
    for flip, other in zip(flips, others, strict=True):
        weight, bias = layer.effective_weight(leaf ^ (1 << (3 - flip.level)))
        torch.testing.assert_close(other.inputs[0], same.inputs[0])
        torch.testing.assert_close(other.outputs[0], weight @ same.inputs[0] + bias, **EXACT)
        assert (other.logits - same.logits).abs().max() > 1e-3


def test_what_follows_a_flip_is_computed_from_it() -> None:
    model = random_model(model_config("mlp", "none"), TEXT)
    layer, sequence = tree_of(model), inputs_for(TEXT)[0][0]
    states: list[Tensor] = []
    handle = model.body.head.register_forward_pre_hook(lambda head, given: states.append(given[0]))
    (same,) = run_changed(model.body, layer, sequence, 5, [Change()])
    handle.remove()
    (other,) = run_changed(model.body, layer, sequence, 5, [Change(Flip(1, 0, 2))])
    state = states[0][5] - same.outputs[0] + other.outputs[0]
    torch.testing.assert_close(other.logits, model.body.head(state[None])[0], **EXACT)


def test_a_flip_at_a_later_step_leaves_the_steps_before_it() -> None:
    model = random_model(model_config("transformer", "fixed"))
    layer, sequence = tree_of(model), inputs_for(TEXT)[0][0]
    same, other = run_changed(model.body, layer, sequence, 9, [Change(), Change(Flip(3, 0, 1))])
    for step in (0, 1):
        torch.testing.assert_close(same.outputs[step], other.outputs[step], **SAME)
    torch.testing.assert_close(same.inputs[2], other.inputs[2], **SAME)
    assert not torch.equal(same.outputs[2], other.outputs[2])
    assert not torch.equal(same.inputs[3], other.inputs[3])


def test_a_change_at_one_position_changes_none_before_it() -> None:
    model = random_model(model_config("transformer", "act"))
    layer, sequence = tree_of(model), inputs_for(TEXT)[0][0]
    seen: list[Tensor] = []
    handle = model.body.register_forward_hook(lambda body, given, output: seen.append(output[0]))
    run_changed(model.body, layer, sequence, 5, [Change(), Change(Flip(1, 0, 1)), Change(halt_at=4)], natural=2)
    handle.remove()
    same, flipped, forced = seen[0]
    for other in (flipped, forced):
        torch.testing.assert_close(same[:5], other[:5], **SAME)
        assert not torch.equal(same[5], other[5])


def _one_step_models(halting: str) -> list[tuple[Any, Tensor, int]]:
    """Models whose positions are on their own, a sequence of one position, and its steps."""
    found = []
    for name in ("mlp", "rnn"):
        model = random_model(model_config(name, halting), VECTORS)
        inputs, _ = inputs_for(VECTORS, 300)
        steps = model(inputs[:, :1])[1].steps
        middle = int(((steps > 1) & (steps < 4)).nonzero()[0])
        found.append((model, inputs[middle, :1], int(steps[middle])))
    return found


@pytest.mark.parametrize("halting", ["act", "ponder"])
def test_forcing_its_own_number_of_steps_changes_nothing(halting: str) -> None:
    for model, sequence, own in _one_step_models(halting):
        same, forced = run_changed(model.body, None, sequence, 0, [Change(), Change(halt_at=own)], natural=own)
        assert same.steps == forced.steps == own
        torch.testing.assert_close(forced.logits, same.logits, **EXACT)


def test_act_cut_short_is_act_with_fewer_steps_at_most() -> None:
    for model, sequence, own in _one_step_models("act"):
        for number in range(1, own):
            (forced,) = run_changed(model.body, None, sequence, 0, [Change(halt_at=number)], natural=own)
            most, model.body.ponder.max_steps = model.body.ponder.max_steps, number
            logits, stats = model(sequence[None])
            model.body.ponder.max_steps = most
            assert forced.steps == number == int(stats.steps)
            torch.testing.assert_close(forced.logits, logits[0, 0], **EXACT)


def test_act_forced_on_spends_its_remainder_on_the_last_state() -> None:
    for model, sequence, own in _one_step_models("act"):
        (forced,) = run_changed(model.body, None, sequence, 0, [Change(halt_at=4)], natural=own)
        states, weights = [], []
        ponder = model.body.ponder
        for number in range(1, 5):
            model.body.ponder = FixedComputation(ponder.cell, number)
            states.append(_state_read(model, sequence))
            weights.append(ponder.halting(states[-1].view(1, -1)))
        model.body.ponder = ponder
        mean = sum(weights[n] * states[n] for n in range(own - 1)) + (1 - sum(weights[: own - 1])) * states[3]
        assert forced.steps == 4
        torch.testing.assert_close(forced.logits, model.body.head(mean).flatten(), **EXACT)


def test_pondernet_forced_to_a_step_answers_from_that_state() -> None:
    for model, sequence, own in _one_step_models("ponder"):
        changes = [Change(halt_at=number) for number in range(1, 5)]
        forced = run_changed(model.body, None, sequence, 0, changes, natural=own)
        ponder = model.body.ponder
        for number, one in enumerate(forced, 1):
            model.body.ponder = FixedComputation(ponder.cell, number)
            assert one.steps == number
            torch.testing.assert_close(one.logits, model(sequence[None])[0][0, 0], **EXACT)
        model.body.ponder = ponder


def _state_read(model: Any, sequence: Tensor) -> Tensor:
    """What the head of a model reads."""
    seen: list[Tensor] = []
    handle = model.body.head.register_forward_pre_hook(lambda head, given: seen.append(given[0]))
    model(sequence[None])
    handle.remove()
    return seen[0]


def test_a_fixed_number_of_steps_is_forced_on_all_positions_and_one_step_is_all_there_is() -> None:
    served = Served(random_model(model_config("mlp", "fixed"), VECTORS), "vectors")
    vector, ponder = inputs_for(VECTORS)[0][0, :1], served.model.body.ponder
    rows = explain_position(served, question_of(served, json.dumps(vector.tolist()), None))["forced"]
    assert [(row["steps"], row["is_own"]) for row in rows] == [(n, n == 4) for n in range(1, 7)]
    for row in rows:
        ponder.num_steps = row["steps"]
        best = served.model(vector[None])[0].view(2, 3).softmax(-1).amax(-1)
        torch.testing.assert_close(torch.tensor(row["probabilities"]), best)
    single = Served(random_model(model_config("mlp", "none"), VECTORS), "vectors")
    assert len(explain_position(single, question_of(single, json.dumps(vector.tolist()), None))["forced"]) == 1


@pytest.mark.parametrize(("classes", "target"), [(3, [2, 0]), (3, [-1, 1]), (1, [1, 0, 0, 1, 1, 0])])
def test_losses_and_divergences_are_those_of_the_targets(classes: int, target: list[int]) -> None:
    shape = TaskShape("vectors", 5, 6, classes, 4)
    served = Served(random_model(model_config("rnn", "act", tree__num_trees=2), shape), "vectors")
    inputs = inputs_for(shape)[0][0, :3]
    given = {"inputs": inputs.tolist(), "targets": [[0] * len(target), target, [0] * len(target)]}
    found = explain_position(served, question_of(served, json.dumps(given), 1))
    logits = served.model(inputs[None])[0][0, 1].view(-1, classes)
    if classes == 1:  # two classes, of which one has the logit 0
        logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
    log_p = logits.log_softmax(1)
    nll = -sum(float(row[right]) for row, right in zip(log_p, target, strict=True) if right >= 0)
    assert found["prediction"]["loss"] == pytest.approx(nll, abs=1e-5) and found["target"] == target
    assert {row["tree"] for row in found["flips"]} == {0, 1}
    flip = found["flips"][0]
    layer = tree_of(served.model)
    (other,) = run_changed(served.model.body, layer, inputs[:2], 1, [Change(Flip(flip["step"], flip["tree"], flip["level"]))])
    after = other.logits.view(-1, classes)
    after = torch.cat([torch.zeros_like(after), after], dim=1) if classes == 1 else after
    divergence = float((log_p.exp() * (log_p - after.log_softmax(1))).sum())
    assert flip["divergence"] == pytest.approx(divergence, abs=1e-5) and divergence > 1e-3


@pytest.mark.parametrize(
    "targets",
    [
        *([[0, 1]], [[0, 1, 2], [0, 1, 2]], [[0, 1], [0, 3]], [[0, 1], [0.5, 1]], 7),
        *([[0, 1], [0, -1e300]], [[0, 1], [-(10**400), 0]], [[0, 1], [0, 10**400]]),
    ],
)
def test_targets_that_are_none_are_refused(targets: Any) -> None:
    served = Served(random_model(model_config("rnn", "none"), VECTORS), "vectors")
    with pytest.raises(DataError, match=r"targets must hold 2 lists \(one a time step\) of 2 numbers below 3"):
        question_of(served, json.dumps({"inputs": [[0.0] * 5] * 2, "targets": targets}), None)


@pytest.mark.parametrize("targets", [[[0, -1]], [[0, 2]]])
def test_binary_targets_are_0_or_1(targets: Any) -> None:
    served = Served(random_model(model_config("mlp", "none"), TaskShape("vectors", 3, 2, 1, 1)), "vectors")
    question_of(served, json.dumps({"inputs": [[0.0] * 3], "targets": [[0, 1]]}), None)
    with pytest.raises(DataError, match="of 2 numbers that are 0 or 1"):
        question_of(served, json.dumps({"inputs": [[0.0] * 3], "targets": targets}), None)


# ---- regions ---------------------------------------------------------------------------------------------------------


def test_adjusted_rand_of_known_partitions() -> None:
    random = torch.Generator().manual_seed(0)
    first = torch.randint(16, (20000,), generator=random)
    assert adjusted_rand(first, first) == 1.0
    assert adjusted_rand(first, torch.randperm(16, generator=random)[first]) == pytest.approx(1.0)
    # Its standard deviation is about 1 / N for partitions of this size.
    assert abs(adjusted_rand(first, torch.randint(16, (20000,), generator=random))) < 1e-3
    # By hand: of 15 pairs 4 are together in each, and 2 in both, where 4 x 4 / 15 are expected.
    left, right = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 0, 1, 2, 2, 2])
    assert adjusted_rand(left, right) == pytest.approx((2 - 4 * 4 / 15) / (4 - 4 * 4 / 15))
    assert adjusted_rand(torch.zeros(5), torch.zeros(5)) == 1.0
    assert adjusted_rand(torch.zeros(6), left) == 0.0


def test_a_region_is_a_number_for_each_different_row() -> None:
    regions = region_of(torch.tensor([[1, 2], [0, 5], [1, 2], [1, 5]]))
    assert len(set(regions.tolist())) == 3 and regions[0] == regions[2]


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(text_run: Config) -> str:
    return str(Path(text_run.run.dir) / "run")


def test_an_explanation_adds_up(run: str) -> None:
    text = "the deep node of a tree"
    found = explain(Path(run), text)
    assert (found["position"], found["target"], found["given"]) == (21, "e", text[6:22])
    assert len(found["passes"]) == found["prediction"]["ponder_steps"] and found["layer"] == "ponder.cell.up"
    for one in found["passes"]:
        assert one["error"] < 1e-5
        assert sum(node["share"] + node["bias_share"] for node in one["nodes"]) == pytest.approx(1)
        assert sum(one["share_per_level"]) == pytest.approx(1) and len(one["nodes"]) == 4
    assert len(found["flips"]) == 3 * len(found["passes"])
    own = [row for row in found["forced"] if row["is_own"]]
    assert len(own) == 1 and abs(own[0]["loss_change"]) < 1e-5 and own[0]["divergence"] < 1e-5
    assert found["forced"][0]["ponder_steps"] == 1


def test_a_position_is_explained_from_what_stands_before_it(run: str) -> None:
    found = explain(Path(run), "the deep node of a tree", position=4)
    assert (found["position"], found["given"], found["target"]) == (4, "the d", "e")
    last = explain(Path(run), "the deep", position=7)
    assert last["target"] is None and last["prediction"]["loss"] is None and last["flips"][0]["loss_change"] is None


def test_tables_and_json(capsys: pytest.CaptureFixture[str], run: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a node")
    file = tmp_path / "why.json"
    assert main(["explain", run, "--input", str(tmp_path / "text"), "--with", run, run, "--json", str(file)]) == 0
    out = capsys.readouterr().out
    found = json.loads(file.read_text())
    assert out.startswith(f"input  file {tmp_path}/text, 6 bytes\nposition ")
    assert "shares sum to 1.000000" in out and "with one bit flipped" in out and "(own)" in out
    assert found["target"] == "e" and found["stability"]["depth"] == 3 and len(found["stability"]["pairs"]) == 3
    assert all(pair["adjusted_rand_per_level"] == [1.0, 1.0, 1.0] for pair in found["stability"]["pairs"])
    assert max(len(line) for line in out.splitlines() if str(tmp_path.parent) not in line) < 130  # but for those with names


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ("{run}", "explain needs an input"),
        ("no/run --input a", "no/run is not a run folder"),
        ("{run} --input a --layer up", "--layer up: the tree layers of the model are ponder.cell.up"),
        ("{run} --input abc --position 3", "--position 3: the input has 3 bytes; give 0 to 2"),
        ("{run} --input {tmp}/empty", "empty is empty"),
        ("{run} --input {tmp}/binary", "binary is binary (byte 1 is 0)"),
        ("{run} --input {tmp}/latin", "latin is not UTF-8"),
        ("{run} --input {tmp}/none", "none is no file; give the name of one."),
        ("{run} --input a --json no/file", "no is not a folder"),
        ("{run} --with {tmp}", "is not a run folder"),
    ],
)
def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, run: str, argv: str, told: str) -> None:
    for name, data in {"empty": b"", "binary": b"a\0b", "latin": b"\xff"}.items():
        (tmp_path / name).write_bytes(data)
    assert main(["explain", *argv.format(run=run, tmp=tmp_path).split()]) == 2
    out, err = capsys.readouterr()
    assert told in err and err.count("\n") == 1 and out == ""


def test_a_text_is_read_as_it_is_or_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("über\n")
    assert read_input(str(tmp_path / "file")) == ("über\n", f"file {tmp_path}/file, 6 bytes")
    assert read_input("x" * 5000) == ("x" * 5000, "text of 5,000 bytes")
    for text in ("1 / 2", "see a.txt now", '{"inputs":[[0.5]],"a":"/"}', "[1,2]", "a.b", "def"):
        assert read_input(text) == (text, f"text of {len(text)} bytes")


def test_a_text_is_read_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a/b")))
    assert read_input("-") == ("a/b", "standard input, 3 bytes")


@pytest.mark.parametrize("name", ["corpus/a", "a.txt", "/no/such", "~/a.py"])
def test_the_name_of_a_file_that_is_not_there_is_not_taken_for_a_text(name: str) -> None:
    with pytest.raises(DataError) as refused:
        read_input(name)
    told = f"--input {name} is no file; give the name of one. If it is the text itself: printf %s "
    assert str(refused.value).startswith(told) and str(refused.value).endswith(" | distcond explain RUN --input -")
