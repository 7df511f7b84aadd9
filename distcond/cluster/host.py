"""What a rank finds out about its host before it trains: files that all hosts share, the same data, the way to the others."""

import os
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from distcond.config import Config
from distcond.data import build_task
from distcond.errors import ClusterError, DataError

LOOPBACK = "127.0.0.1"
LOOK_AGAIN_S, POLL_S = 5.0, 0.2
"For a file that another host has just written to appear in a network file system."


def this_host(address: str) -> str:
    """A host as people know it: name and address."""
    return f"{platform.node()} ({address})"


def check_storage(proof_file: Path, proof: str, run_dir: str, host: str, head: str) -> None:
    """Raise ClusterError where this host does not see what the run has just written into its folder on `head`."""
    end = time.monotonic() + LOOK_AGAIN_S
    while not (proof_file.exists() and proof_file.read_text() == proof):
        if time.monotonic() > end:
            raise ClusterError(
                f"run.dir={run_dir} is not on storage that all hosts share: {host} does not see what {head} has written there; "
                "set run.dir to a folder that every host of the cluster mounts."
            )
        time.sleep(POLL_S)


def data_identity(config: Config) -> dict[str, Any]:
    """What the examples are, the same on all hosts. Raises DataError where they are not there."""
    return {key: value for key, value in build_task(config.data).fingerprint().items() if key != "python"}


def check_data(config: Config, expected: Mapping[str, Any], host: str, head: str) -> None:
    """Raise DataError where this host has not the examples that `head` has, for ranks would train on different batches."""
    try:
        found = data_identity(config)
    except DataError as error:
        raise DataError(
            f"{host}: {error} Every host reads the data itself; put them on storage that all hosts share, or on each of them."
        ) from error
    if found != expected:
        raise DataError(
            f"{host} has other data={config.data.name} than {head}; put them on storage that all hosts share, or the same on "
            "each of them."
        )


def choose_interface(address: str) -> None:
    """Have gloo talk over the interface of this host that has `address`, Ray's; unless GLOO_SOCKET_IFNAME says otherwise.

    NOTE: by itself gloo takes the one that the host's own name leads to, which is loopback on many.
    """
    if address == LOOPBACK:  # nor would it listen there alone, where Ray is closed to other machines
        os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    elif interface := interface_of(address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def interface_of(address: str) -> str:
    """The network interface of this host that has an address; empty: none, e.g. behind address translation."""
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, given in interfaces if address in {each.address.partition("%")[0] for each in given}), "")
