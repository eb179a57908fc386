"""What a cluster of the tests takes from the machine: a number that is its own, and nothing left behind under it."""

import contextlib
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from tests.requirements import ADMIN_FOLDERS

Found = TypeVar("Found")
# Daemons live in folders that a user's PATH often leaves out.
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), *ADMIN_FOLDERS])
# Outside of both the ephemeral range and the ports that jobs meet at.
FIRST_PORT = 26000
PORTS_PER_CLUSTER = 100
CLUSTERS = 60


def refusal_of_namespaces() -> str:
    """Return why this machine allows no network namespaces behind a bridge, or nothing where it does."""
    name = f"ldmtry{os.getpid()}"[:14]
    steps = (
        ("ip", "netns", "add", name),
        ("ip", "link", "add", name, "type", "bridge"),
        ("ip", "link", "add", f"{name}v", "type", "veth", "peer", "name", "eth0", "netns", name),
        ("nsenter", f"--net=/run/netns/{name}", "unshare", "--uts", "--mount", "hostname", "node"),
    )
    try:
        for step in steps:
            run_tool(*step)
    except OSError as error:
        return str(error)
    finally:
        for link in (f"{name}v", name):
            run_tool("ip", "link", "del", link, check=False)
        run_tool("ip", "netns", "del", name, check=False)
    return ""


def until(true: Callable[[], Found], seconds: float, what: str) -> Found:
    """Return the first true answer of `true`, asked every 50 ms for at most `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := true()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds} s for {what}")
        time.sleep(0.05)
    return found


def run_tool(*command: str, environment: Mapping[str, str] | None = None, check: bool = True) -> str:
    """Return what a command printed.

    Raises:
        OSError: it did not end with 0, and `check`.
    """
    environment = environment or {**os.environ, "PATH": SEARCH_PATH}
    done = subprocess.run(
        command,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=60,
        check=False,
    )
    if check and done.returncode:
        raise OSError(f"{' '.join(command)}: exit code {done.returncode}: {done.stdout.strip()}")
    return done.stdout.strip()


@contextlib.contextmanager
def own_number() -> Iterator[int]:
    """Yield a cluster's number that nobody else on this machine uses, with nothing of a killed test run left under it."""
    addresses = run_tool("ip", "-o", "-4", "addr", "show")
    for number in range(CLUSTERS):
        with Path(tempfile.gettempdir(), f"{folder_prefix(number)}lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            _remove_remains(number)
            with contextlib.suppress(OSError), socket.socket() as probe:
                probe.bind(("", FIRST_PORT + number * PORTS_PER_CLUSTER))
                if f" 10.77.{number}." in addresses and bridge_name(number) not in addresses:
                    continue  # A network of the machine's own.
                probe.close()
                yield number
                return
    raise OSError("no number is free for a cluster")


def _remove_remains(number: int) -> None:
    """End and remove what an earlier cluster of this number has left: processes, namespaces, bridge, folders."""
    folders = list(Path(tempfile.gettempdir()).glob(f"{folder_prefix(number)}*/"))
    for folder in folders:
        kill_all_that_carry(f"SLURM_CONF={folder}/etc/slurm.conf")
        shutil.rmtree(folder, ignore_errors=True)
    for line in run_tool("ip", "netns", "list", check=False).splitlines():
        space = line.split()[0]
        if space.startswith(f"{bridge_name(number)}-"):
            for pid in run_tool("ip", "netns", "pids", space, check=False).split():
                with contextlib.suppress(ProcessLookupError, ValueError):
                    os.kill(int(pid), signal.SIGKILL)
            run_tool("ip", "netns", "del", space)
    for link in re.findall(
        rf"^\d+: ({bridge_name(number)}(?:v\d+)?)[@:]", run_tool("ip", "-o", "link"), re.MULTILINE
    ):
        run_tool("ip", "link", "del", link, check=False)


def kill_all_that_carry(variable: str) -> None:
    """Kill every process with this NAME=VALUE in its environment."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if variable.encode() in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)


def folder_prefix(number: int) -> str:
    """Return how the names of the folders of cluster `number` begin."""
    return f"ldm-slurm-{number}-"


def bridge_name(number: int) -> str:
    """Return the name of its bridge, which those of its namespaces and cables begin with."""
    return f"ldm{number}"
