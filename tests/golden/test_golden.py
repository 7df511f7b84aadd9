"""A change that is not meant to alter results leaves 20 steps of training as they were."""

import json

import pytest

from tests.golden.regenerate import FILE, NAMES, losses_of, machine

GOLDEN = json.loads(FILE.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_losses_of_20_steps_are_the_golden_ones(name: str) -> None:
    losses, golden = losses_of(name), [float.fromhex(loss) for loss in GOLDEN["losses"][name]]
    if machine() == GOLDEN["machine"]:
        assert losses == golden
    else:
        # Other kernels add in another order, 1e-7 of each sum (seen after 20 steps with ATEN_CPU_CAPABILITY=default: 2e-7);
        # the rest is room for releases of torch, not for another model.
        assert losses == pytest.approx(golden, rel=1e-4)
