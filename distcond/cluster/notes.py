"""Lines from a rank to the user's screen by way of Ray's key-value store: the disk of the run folder may be the trouble."""

import time

NAMESPACE = b"distcond"


def post(channel: str, line: str) -> None:
    """Leave a line for whoever reads this channel."""
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(f"{channel}/{time.time_ns():020d}".encode(), line.encode(), namespace=NAMESPACE)


def take(channel: str) -> list[str]:
    """The lines left since the last call, in their order."""
    from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_list

    lines = []
    for key in sorted(_internal_kv_list(f"{channel}/".encode(), namespace=NAMESPACE)):
        lines.append((_internal_kv_get(key, namespace=NAMESPACE) or b"").decode())
        _internal_kv_del(key, namespace=NAMESPACE)
    return lines
