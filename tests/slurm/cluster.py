"""A real Slurm cluster on this machine for tests: munged, slurmctld and a slurmd a node, all as children of ours.

Nothing outside of one temporary folder is written. In `netns` mode every node has a network namespace behind a
bridge, with its own host name, address and /etc/hosts; where the kernel forbids that, `lo` mode runs all nodes in the
host's network, under addresses 127.0.77.N. Needs root and no systemd. Two nodes are up after about a second.

Clusters are numbered: folder, ports, bridge, namespaces and addresses follow from the number, which belongs to whoever
holds its lock. What else carries that number was left behind by a test run that was killed, and is removed.
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from tests.slurm.machine import (
    FIRST_PORT,
    PORTS_PER_CLUSTER,
    SEARCH_PATH,
    bridge_name,
    folder_prefix,
    kill_all_that_carry,
    own_number,
    run_tool,
    until,
)

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo", "ip")
ENDED = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY"})

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

    failures: tuple[str, ...] = ()
    """Why it runs in no earlier one of the modes that were asked for."""

    def __init__(self, root: Path, mode: Literal["netns", "lo"], nodes: int, number: int) -> None:
        """Describe cluster `number`, of `nodes` nodes below `root`; `start` brings it up."""
        self.root, self.mode = root, mode
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self.config = root / "etc" / "slurm.conf"
        inherited = {
            key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))
        }
        self.environment = {**inherited, "SLURM_CONF": str(self.config), "PATH": SEARCH_PATH}
        self._port = FIRST_PORT + number * PORTS_PER_CLUSTER
        self._subnet = f"10.77.{number}" if mode == "netns" else "127.0.77"
        self._bridge = bridge_name(number)
        self._slurmd: dict[str, subprocess.Popen[bytes]] = {}

    @classmethod
    @contextlib.contextmanager
    def start(
        cls, nodes: int, modes: Sequence[Literal["netns", "lo"]] = ("netns", "lo")
    ) -> "Iterator[Cluster]":
        """Yield a cluster with all nodes idle, in the first of `modes` that this machine allows; end it after."""
        failures: list[str] = []
        for mode in modes:
            with contextlib.ExitStack() as stack:
                number = stack.enter_context(own_number())
                # 755: Slurm's commands of other users read the config, and wait for a minute where they cannot.
                root = Path(tempfile.mkdtemp(prefix=folder_prefix(number)))
                root.chmod(0o755)
                stack.callback(shutil.rmtree, root, ignore_errors=True)
                cluster = cls(root, mode, nodes, number)
                try:
                    cluster._up(stack)
                except (subprocess.SubprocessError, OSError, TimeoutError) as error:
                    failures.append(f"{mode}: {error}\n{cluster._logs()}")
                    continue
                cluster.failures = tuple(failures)
                yield cluster
                return
        raise RuntimeError("no Slurm cluster came up:\n" + "\n".join(failures))

    # -- verbs

    def run(self, *command: str, check: bool = True) -> str:
        """Run one of Slurm's commands and return what it printed."""
        return run_tool(*command, environment=self.environment, check=check)

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
            for pid in run_tool("ip", "netns", "pids", self._space(node)).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)

    def cut(self, node: str) -> None:
        """Pull the node's cable; what runs there goes on."""
        run_tool("ip", "link", "set", f"{self._bridge}v{self._number(node)}", "down")

    def enter_mounts(self, node: str, *command: str) -> None:
        """Run a command that sees what `node` has mounted: each has mounts of its own."""
        run_tool("nsenter", f"--mount=/proc/{self._slurmd[node].pid}/ns/mnt", *command)

    def heal(self) -> None:
        """Plug in every cable, start the slurmd of every node that has none, and wait until all nodes are idle."""
        for node in self.nodes:
            if self.mode == "netns":
                run_tool("ip", "link", "set", f"{self._bridge}v{self._number(node)}", "up")
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
        run_tool("ip", "link", "add", bridge, "type", "bridge")
        stack.callback(run_tool, "ip", "link", "del", bridge, check=False)
        run_tool("ip", "addr", "add", f"{self._subnet}.254/24", "dev", bridge)
        run_tool("ip", "link", "set", bridge, "up")
        for number in range(1, len(self.nodes) + 1):
            space, cable = f"{bridge}-{number}", f"{bridge}v{number}"
            run_tool("ip", "netns", "add", space)
            stack.callback(run_tool, "ip", "netns", "del", space, check=False)
            run_tool("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
            run_tool("ip", "link", "set", cable, "master", bridge, "up")
            run_tool("ip", "-n", space, "link", "set", "lo", "up")
            run_tool("ip", "-n", space, "addr", "add", f"{self._subnet}.{number}/24", "dev", "eth0")
            run_tool("ip", "-n", space, "link", "set", "eth0", "up")

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
        kill_all_that_carry(f"SLURM_CONF={self.config}")

    def _logs(self) -> str:
        logs = sorted((self.root / "log").glob("*"))
        return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-1000:]}" for log in logs)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
