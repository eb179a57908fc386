"""Ports for test servers that nobody else on the machine gets in the meantime."""

import fcntl
import os
import random
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOWEST_PORT, HIGHEST_PORT = 10_000, 65_535
EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


@contextmanager
def reserved_port() -> Iterator[int]:
    """Yield a TCP port that is free on all addresses and reserved among all test runs of this machine.

    Outside the ephemeral range: the kernel gives no outgoing connection that port between our look and the
    server's bind. A locked file per port keeps parallel tests apart; the lock falls with its process.

    Raises: OSError where 1000 tries find none.
    """
    locks = Path(tempfile.gettempdir(), f"ldm-test-ports-{os.geteuid()}")
    locks.mkdir(exist_ok=True)
    candidates = _outside_ephemeral_range()
    for _ in range(1000):
        port = random.SystemRandom().choice(candidates)
        lock = os.open(locks / str(port), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if _locked(lock) and _is_free(port):
                yield port
                return
        finally:
            os.close(lock)
    raise OSError(f"no free port among {len(candidates)} outside the ephemeral range in 1000 tries")


def _outside_ephemeral_range() -> list[int]:
    low, high = map(int, EPHEMERAL_RANGE.read_text().split())
    ports = [port for port in range(LOWEST_PORT, HIGHEST_PORT + 1) if not low <= port <= high]
    return ports or list(range(1024, LOWEST_PORT))


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
        return True
