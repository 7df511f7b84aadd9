from typing import Any

import pytest
import ray

from distcond.cluster.notes import post, take


@pytest.mark.ray
def test_lines_arrive_once_in_their_order_and_on_their_channel(shared_ray: Any) -> None:
    remote = ray.remote(num_cpus=0)(lambda: [post("/runs/a", f"line {number}: ü") for number in range(12)] and None)
    ray.get(remote.remote())
    post("/runs/ab", "another run's")
    assert take("/runs/a") == [f"line {number}: ü" for number in range(12)]
    assert take("/runs/a") == []
    assert take("/runs/ab") == ["another run's"]
