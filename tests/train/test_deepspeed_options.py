"""DeepSpeed's configuration: what a run decides is derived, what it does not decide passes through."""

from pathlib import Path
from typing import Any

import pytest

from distcond.errors import ConfigError
from distcond.train.deepspeed_options import DERIVED_KEYS, deepspeed_options
from tests.helpers import run_ranks, small_config, train_here


def test_options_are_derived_from_the_run() -> None:
    run = {"cluster__num_workers": 2, "data__global_batch_size": 24, "optim__accumulation": 3, "optim__grad_clip": 0.5}
    options = deepspeed_options(small_config("runs", **run, optim__zero_stage=2, optim__precision="bf16", optim__lr=0.1))
    assert options["train_micro_batch_size_per_gpu"] == 4
    assert (options["gradient_accumulation_steps"], options["gradient_clipping"]) == (3, 0.5)
    assert options["zero_optimization"] == {"stage": 2} and options["bf16"] == {"enabled": True}
    assert options["optimizer"]["params"]["lr"] == 0.1
    assert options["optimizer"]["params"]["torch_adam"], "DeepSpeed's own Adam would have to be compiled"


def test_other_options_pass_through() -> None:
    passed = {"zero_optimization": {"overlap_comm": True}, "comms_logger": {"enabled": True}, "steps_per_print": 7}
    options = deepspeed_options(small_config("runs", optim__deepspeed=passed, optim__zero_stage=1))
    assert options["zero_optimization"] == {"overlap_comm": True, "stage": 1}
    assert options["comms_logger"] == {"enabled": True} and options["steps_per_print"] == 7


@pytest.mark.parametrize(
    ("options", "key"),
    [({key: 1}, key) for key in DERIVED_KEYS] + [({"zero_optimization": {"stage": 2}}, "zero_optimization.stage")],
)
def test_derived_option_is_refused_with_what_to_set_instead(options: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as refused:
        deepspeed_options(small_config("runs", optim__deepspeed=options))
    line = str(refused.value)
    assert line.startswith(f"optim.deepspeed.{key} is derived by distcond; set ") and "\n" not in line
    assert any(name in line for name in ("optim.", "data.", "cluster."))


def test_deepspeed_calls_nothing_that_it_is_given(tmp_path: Path) -> None:
    call = {"_target_": "os.mkdir", "path": str(tmp_path / "canary")}
    options = {**call, "nobody_knows": call, "zero_optimization": {"overlap_comm": False}}
    run_ranks(train_here, 1, small_config(tmp_path, train__max_steps=1, optim__deepspeed=options))
    assert not (tmp_path / "canary").exists()


def test_options_of_zero_are_a_mapping() -> None:
    with pytest.raises(ConfigError, match=r"optim\.deepspeed\.zero_optimization=5: needed is a mapping"):
        deepspeed_options(small_config("runs", optim__deepspeed={"zero_optimization": 5}))
