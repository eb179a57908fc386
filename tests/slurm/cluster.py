"""A real Slurm cluster on this machine for tests: munged, slurmctld and a slurmd a node, all as children of ours.

Nothing outside of one temporary folder is written. In `netns` mode every node has a network namespace behind a
bridge, with its own host name, address and /etc/hosts; where the kernel forbids that, `lo` mode runs all nodes in the
host's network, under addresses 127.0.77.N. Needs root and no systemd. Two nodes are up after about a second.
"""

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from tests.requirements import ADMIN_FOLDERS

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo", "ip")
Found = TypeVar("Found")
# Daemons live in folders that a user's PATH often leaves out.
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), *ADMIN_FOLDERS])
ENDED = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY"})
# Outside of both the ephemeral range and the ports that jobs meet at.
FIRST_PORT = 26000
PORTS_PER_CLUSTER = 100

CONFIG = """\
ClusterName=test
SlurmctldHost={host}({controller})
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
SlurmdPort={node_port}
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits; its default is 120 s, its minimum 5 s.
AuthInfo=socket={root}/run/munge.sock,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
# No cgroups: the tests run in containers that have none to give.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=200000,batch_sched_delay=0
JobRequeue=1
SlurmdTimeout=60
SlurmctldTimeout=30
MessageTimeout=5
TCPTimeout=2
KillWait=5
CompleteWait=0
MinJobAge=3600
ReturnToService=2
SlurmdParameters=config_overrides
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=train Nodes=ALL Default=YES State=UP MaxTime=INFINITE DefaultTime=10 PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL State=UP MaxTime=INFINITE DefaultTime=10 PriorityTier=9 PreemptMode=OFF
"""


class Cluster:
    """A running cluster: its nodes, the environment for Slurm's commands, and a few verbs over them."""

    def __init__(self, root: Path, mode: Literal["netns", "lo"], nodes: int) -> None:
        """Describe a cluster of `nodes` nodes below `root`; `start` brings it up."""
        self.root, self.mode = root, mode
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self.config = root / "etc" / "slurm.conf"
        inherited = {
            key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))
        }
        self.environment = {**inherited, "SLURM_CONF": str(self.config), "PATH": SEARCH_PATH}
        self._port = _free_ports()
        self._subnet = _free_subnet() if mode == "netns" else "127.0.77"
        self._bridge = f"ldm{self._port // PORTS_PER_CLUSTER}"
        self._slurmd: dict[str, subprocess.Popen[bytes]] = {}

    @classmethod
    @contextlib.contextmanager
    def start(
        cls, nodes: int, modes: Sequence[Literal["netns", "lo"]] = ("netns", "lo")
    ) -> "Iterator[Cluster]":
        """Yield a cluster with all nodes idle, in the first of `modes` that this machine allows; end it after."""
        failures = []
        for mode in modes:
            with contextlib.ExitStack() as stack:
                # 755: Slurm's commands of other users read the config, and wait for a minute where they cannot.
                root = Path(tempfile.mkdtemp(prefix="ldm-slurm-"))
                root.chmod(0o755)
                stack.callback(shutil.rmtree, root, ignore_errors=True)
                cluster = cls(root, mode, nodes)
                try:
                    cluster._up(stack)
                except (subprocess.SubprocessError, OSError, TimeoutError) as error:
                    failures.append(f"{mode}: {error}\n{cluster._logs()}")
                    continue
                yield cluster
                return
        raise RuntimeError("no Slurm cluster came up:\n" + "\n".join(failures))

    # -- verbs

    def run(self, *command: str, check: bool = True) -> str:
        """Run one of Slurm's commands and return what it printed."""
        return _run(*command, environment=self.environment, check=check)

    def show(self, job: str) -> dict[str, str]:
        """Return the fields of `scontrol show job`, or nothing if Slurm does not know the job."""
        text = self.run("scontrol", "--oneliner", "show", "job", job, check=False)
        return dict(re.findall(r"(\w[\w:]*)=(\S*)", text)) if text.startswith("JobId") else {}

    def wait_for_state(self, job: str, *states: str, seconds: float = 60.0) -> dict[str, str]:
        """Return the job's fields once its state is one of `states` (none given: it has ended)."""
        wanted = frozenset(states) or ENDED

        def shown() -> dict[str, str]:
            fields = self.show(job)
            return fields if fields.get("JobState") in wanted else {}

        return until(shown, seconds, f"job {job} to be {' or '.join(sorted(wanted))}")

    def cancel_all(self) -> None:
        """End every job and wait until the nodes are free again."""
        self._end_jobs()
        until(lambda: not self.run("squeue", "--noheader", check=False), 30, "the queue to be empty")

    def _end_jobs(self) -> None:
        jobs = set(self.run("squeue", "--noheader", "--format=%A", check=False).split())
        if jobs:
            self.run("scancel", "--full", "--signal=KILL", *jobs, check=False)
            self.run("scancel", *jobs, check=False)

    # -- faults of nodes (netns only)

    def crash(self, node: str) -> None:
        """Kill everything that runs on `node` at once, as a power cut does."""
        for _ in range(3):  # What is being forked meanwhile is found the next time.
            for pid in _run("ip", "netns", "pids", self._space(node)).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)

    def cut(self, node: str) -> None:
        """Pull the node's cable; what runs there goes on."""
        _run("ip", "link", "set", f"{self._bridge}v{self._number(node)}", "down")

    def heal(self) -> None:
        """Plug in every cable, start the slurmd of every node that has none, and wait until all nodes are idle."""
        for node in self.nodes:
            if self.mode == "netns":
                _run("ip", "link", "set", f"{self._bridge}v{self._number(node)}", "up")
            if self._slurmd[node].poll() is not None:
                self._start_node(node)
        # Before the nodes are down: a job with a spare would outlive them.
        self._end_jobs()
        self.run(
            "scontrol", "update", f"NodeName={','.join(self.nodes)}", "State=DOWN", "Reason=test", check=False
        )
        until(lambda: not self.run("squeue", "--noheader", check=False), 30, "the queue to be empty")

        def resumed() -> bool:
            names = ("--noheader", "--Node", "--states=idle", "--responding", "--format=%N")
            idle = set(self.run("sinfo", *names, check=False).split())
            for node in set(self.nodes) - idle:
                self.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
            return len(idle) == len(self.nodes)

        until(resumed, 90, "idle nodes")

    def _number(self, node: str) -> int:
        return self.nodes.index(node) + 1

    def _space(self, node: str) -> str:
        return f"{self._bridge}-{self._number(node)}"

    def _start_node(self, node: str) -> None:
        (self.root / "spool" / node).mkdir(exist_ok=True)
        self._slurmd[node] = self._daemon(self._stack, *self._node_command(self._number(node), node))

    # -- up and down

    def _up(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        for folder in ("etc", "run", "log", "state", "munge", "spool"):
            (self.root / folder).mkdir(mode=0o755)
        (self.root / "munge").chmod(0o700)
        key = self.root / "munge" / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        self._write_config()
        run, log = self.root / "run", self.root / "log"
        options = {
            "key-file": key,
            "socket": run / "munge.sock",
            "pid-file": run / "munged.pid",
            "log-file": log / "munged.log",
            "seed-file": self.root / "munge" / "seed",
        }
        self._daemon(
            stack,
            "munged",
            "--foreground",
            "--force",
            *(f"--{name}={path}" for name, path in options.items()),
        )
        until(lambda: (run / "munge.sock").exists(), 10, "munged's socket")
        if self.mode == "netns":
            self._make_network(stack)
        self._daemon(stack, "slurmctld", "-D", "-i", "-f", str(self.config))
        for node in self.nodes:
            self._start_node(node)
        stack.callback(self._end_leftovers)
        stack.callback(self.cancel_all)
        names = ("--noheader", "--Node", "--states=idle", "--format=%N")
        until(
            lambda: len(set(self.run("sinfo", *names, check=False).split())) == len(self.nodes),
            20,
            "idle nodes",
        )

    def _write_config(self) -> None:
        host, netns = socket.gethostname().split(".")[0], self.mode == "netns"
        lines = []
        for number, node in enumerate(self.nodes, 1):
            port = self._port + 2 if netns else self._port + 10 + number
            name = node if netns else host
            address = f"NodeAddr={self._subnet}.{number} NodeHostname={name} Port={port}"
            lines.append(f"NodeName={node} {address} CPUs=4 RealMemory=1000 State=UNKNOWN")
        text = CONFIG.format(
            host=host,
            controller=f"{self._subnet}.254" if netns else "127.0.0.1",
            port=self._port,
            node_port=self._port + 2,
            root=self.root,
            nodes="\n".join(lines),
        )
        self.config.write_text(text)
        hosts = [f"{self._subnet}.{number} {node}" for number, node in enumerate(self.nodes, 1)]
        hosts = ["127.0.0.1 localhost", f"{self._subnet}.254 {host}", *hosts]
        (self.root / "etc" / "hosts").write_text("\n".join(hosts) + "\n")

    def _make_network(self, stack: contextlib.ExitStack) -> None:
        bridge = self._bridge
        _run("ip", "link", "add", bridge, "type", "bridge")
        stack.callback(_run, "ip", "link", "del", bridge, check=False)
        _run("ip", "addr", "add", f"{self._subnet}.254/24", "dev", bridge)
        _run("ip", "link", "set", bridge, "up")
        for number in range(1, len(self.nodes) + 1):
            space, cable = f"{bridge}-{number}", f"{bridge}v{number}"
            _run("ip", "netns", "add", space)
            stack.callback(_run, "ip", "netns", "del", space, check=False)
            _run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
            _run("ip", "link", "set", cable, "master", bridge, "up")
            _run("ip", "-n", space, "link", "set", "lo", "up")
            _run("ip", "-n", space, "addr", "add", f"{self._subnet}.{number}/24", "dev", "eth0")
            _run("ip", "-n", space, "link", "set", "eth0", "up")

    def _node_command(self, number: int, node: str) -> list[str]:
        if self.mode == "lo":
            return ["slurmd", "-D", "-N", node, "-f", str(self.config)]
        # Not `ip netns exec`, which hides /sys/fs/cgroup: slurmd does not start without it.
        enter = ["nsenter", f"--net=/run/netns/{self._bridge}-{number}", "unshare", "--uts", "--mount"]
        inside = 'hostname "$1"; mount --bind "$2" /etc/hosts; exec slurmd -D -f "$3"'
        return [
            *enter,
            "bash",
            "-c",
            inside,
            "node",
            node,
            str(self.root / "etc" / "hosts"),
            str(self.config),
        ]

    def _daemon(self, stack: contextlib.ExitStack, *command: str) -> "subprocess.Popen[bytes]":
        log = stack.enter_context(
            (self.root / "log" / f"{len(list((self.root / 'log').iterdir()))}.out").open("wb")
        )
        process = subprocess.Popen(
            # The kernel ends the daemon when the test run is killed.
            ["setpriv", "--pdeathsig", "KILL", *command],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        stack.callback(_end, process)
        return process

    def _end_leftovers(self) -> None:
        """Kill what still carries this cluster's config in its environment: step daemons and jobs outlive slurmd."""
        mark = f"SLURM_CONF={self.config}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    os.kill(int(folder.name), signal.SIGKILL)

    def _logs(self) -> str:
        logs = sorted((self.root / "log").glob("*"))
        return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-1000:]}" for log in logs)


def until(true: Callable[[], Found], seconds: float, what: str) -> Found:
    """Return the first true answer of `true`, asked every 50 ms for at most `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := true()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds} s for {what}")
        time.sleep(0.05)
    return found


def _run(*command: str, environment: Mapping[str, str] | None = None, check: bool = True) -> str:
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


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_ports() -> int:
    """Return the first of a block of ports that no other cluster on this machine uses."""
    for base in range(FIRST_PORT, 32000, PORTS_PER_CLUSTER):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", base))
            return base
    raise OSError("no free block of ports for a cluster")


def _free_subnet() -> str:
    taken = _run("ip", "-o", "-4", "addr", "show")
    return next(f"10.77.{number}" for number in range(1, 255) if f" 10.77.{number}." not in taken)
