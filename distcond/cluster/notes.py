"""Lines from a rank to the user's screen by way of Ray's key-value store: the disk of the run folder may be the trouble."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

NAMESPACE = b"distcond"
TIMEOUT_S, INTERVAL_S = 1.0, 0.2
"For an answer of Ray's store; between two looks."


def post(channel: str, line: str) -> None:
    """Leave a line for whoever reads this channel."""
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(f"{channel}/{time.time_ns():020d}".encode(), line.encode(), namespace=NAMESPACE)


def take(channel: str) -> list[str]:
    """The lines left since the last call, in their order; none where Ray does not answer within TIMEOUT_S."""
    from ray.exceptions import RpcError
    from ray.experimental.internal_kv import internal_kv_get_gcs_client

    store, lines = internal_kv_get_gcs_client(), []
    try:
        for key in sorted(store.internal_kv_keys(f"{channel}/".encode(), NAMESPACE, timeout=TIMEOUT_S)):
            lines.append((store.internal_kv_get(key, NAMESPACE, timeout=TIMEOUT_S) or b"").decode())
            store.internal_kv_del(key, False, NAMESPACE, timeout=TIMEOUT_S)
    except RpcError:
        pass
    return lines


@contextmanager
def passed_on(channel: str, tell: Callable[[str], None]) -> Iterator[None]:
    """While inside, and once more on leaving, give the lines of a channel to `tell`.

    In a thread, for whoever waits for a run must not wait for a Ray that has died: its store answers after a minute.
    """
    is_over = threading.Event()

    def run() -> None:
        while True:
            is_last = is_over.wait(INTERVAL_S)
            for line in take(channel):
                tell(line)
            if is_last:
                return

    thread = threading.Thread(target=run, name="notes", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(2 * TIMEOUT_S)
