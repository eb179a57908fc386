"""Which nodes can be used: a probe of each node's slurmd, and the list of bad ones, which forgets.

Slurm's own view of a node is `SlurmdTimeout` late, five minutes by default. Whether its slurmd takes a connection is
known at once.
"""

import errno
import json
import re
import select
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from launch.slurm.sbatch import call
from pipeline import publish
from pipeline.errors import ToolError
from pipeline.paths import RunPaths

SCONTROL_SECONDS = 20.0
PROBE_SECONDS = 2.0
# A bad node is tried again after a day: somebody has looked at it by then, or it was not the node.
EXPIRY_SECONDS = 24 * 3600.0
# How often it takes: a lost node and a failed preflight are facts, a rank that hung there may be the program's fault.
STRIKES = {"lost": 1, "preflight": 1, "stuck": 2}
ENOUGH = 1.0


def expand(node_list: str) -> list[str]:
    """Return the host names of Slurm's compressed list, in its order.

    Raises:
        ToolError: when scontrol is missing or names none.
    """
    done = call(("scontrol", "show", "hostnames", node_list), timeout_seconds=SCONTROL_SECONDS)
    hosts = done.stdout.split()
    if done.returncode or not hosts:
        raise ToolError(f"scontrol names no host in {node_list!r}: {done.stderr.strip() or 'no reason'}")
    return hosts


def slurmd_addresses(hosts: Sequence[str]) -> dict[str, tuple[str, int]]:
    """Return address and port of the slurmd of each host that Slurm tells us about."""
    done = call(("scontrol", "--oneliner", "show", "node", ",".join(hosts)), timeout_seconds=SCONTROL_SECONDS)
    told = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in done.stdout.splitlines()]
    usual = 6818
    if any("Port" not in fields for fields in told):
        config = call(("scontrol", "show", "config"), timeout_seconds=SCONTROL_SECONDS).stdout
        match = re.search(r"^SlurmdPort\s*=\s*(\d+)", config, re.MULTILINE)
        usual = int(match[1]) if match else usual
    return {
        fields["NodeName"]: (fields["NodeAddr"], int(fields.get("Port", usual)))
        for fields in told
        if fields.get("NodeName") and fields.get("NodeAddr")
    }


def controller_answers(job_id: str) -> bool:
    """Return whether slurmctld can be asked about this job: where it cannot, it may be this host that is cut off."""
    try:
        words = ("squeue", "--noheader", f"--jobs={job_id}", "--format=%i")
        return call(words, timeout_seconds=SCONTROL_SECONDS).returncode == 0
    except ToolError:
        return False


def silent_nodes(
    addresses: Mapping[str, tuple[str, int]], *, timeout_seconds: float = PROBE_SECONDS
) -> list[str]:
    """Return the nodes whose slurmd takes no connection, all asked at once; at most `timeout_seconds`."""
    waiting: dict[int, tuple[str, socket.socket]] = {}
    silent, poll = [], select.poll()
    for node, address in addresses.items():
        try:
            probe = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            probe.setblocking(False)
            code = probe.connect_ex(address)
        except OSError:  # Its name is not known any more.
            silent.append(node)
            continue
        if code not in (0, errno.EINPROGRESS):
            silent.append(node)
            probe.close()
            continue
        waiting[probe.fileno()] = (node, probe)
        poll.register(probe, select.POLLOUT)
    deadline = time.monotonic() + timeout_seconds
    while waiting and (left := deadline - time.monotonic()) > 0:
        for descriptor, _ in poll.poll(left * 1000):
            node, probe = waiting.pop(descriptor)
            poll.unregister(descriptor)
            if probe.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                silent.append(node)
            probe.close()
    for node, probe in waiting.values():
        silent.append(node)
        probe.close()
    return sorted(silent)


def note_bad(run: RunPaths, node: str, kind: str, reason: str) -> None:
    """Add what happened on `node` to the run's list; `kind` is one of STRIKES."""
    record = _read(run)
    event = {"time": time.time(), "kind": kind, "reason": reason}
    record.setdefault(node, []).append(event)
    publish.write_json(run.bad_nodes, record)


def bad_nodes(run: RunPaths, *, now: float | None = None) -> list[str]:
    """Return the nodes not to be used: one fact, or several suspicions, within the last day."""
    now = time.time() if now is None else now
    bad = []
    for node, events in _read(run).items():
        weight = sum(1 / STRIKES[event["kind"]] for event in events if now - event["time"] < EXPIRY_SECONDS)
        if weight >= ENOUGH - 1e-9:
            bad.append(node)
    return sorted(bad)


def _read(run: RunPaths) -> dict[str, list[dict[str, Any]]]:
    try:
        record: dict[str, list[dict[str, Any]]] = json.loads(run.bad_nodes.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        return {}  # Nobody's work is lost with it: a bad node shows again.
    return record
