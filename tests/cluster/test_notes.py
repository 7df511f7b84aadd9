from typing import Any

import pytest
import ray

from distcond.cluster.notes import post, take
from tests.cluster.processes import wait_until


@pytest.mark.ray
def test_lines_arrive_once_in_their_order_and_on_their_channel(shared_ray: Any) -> None:
    remote = ray.remote(num_cpus=0)(lambda: [post("/runs/a", f"line {number}: ü") for number in range(12)] and None)
    ray.get(remote.remote())
    post("/runs/ab", "another run's")
    lines: list[str] = []
    wait_until(lambda: lines.extend(take("/runs/a")) or len(lines) >= 12)  # a store that is slow is asked again
    assert lines == [f"line {number}: ü" for number in range(12)]
    assert take("/runs/a") == []
    assert take("/runs/ab") == ["another run's"]
