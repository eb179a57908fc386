"""A test run that was killed leaves nothing in the way of the next: the number of its cluster is free again, and clean."""

import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.requirements import require_root, require_tool
from tests.slurm.machine import bridge_name, folder_prefix, own_number, refusal_of_namespaces, run_tool, until

pytestmark = pytest.mark.slurm


def test_what_a_killed_run_left_is_removed_and_what_lives_is_not() -> None:
    require_root()
    require_tool("ip", "apt-get install iproute2")
    with own_number() as number, own_number() as other:
        assert other != number
    folder = Path(tempfile.mkdtemp(prefix=folder_prefix(number)))
    left = [subprocess.Popen(["sleep", "600"], env={"SLURM_CONF": f"{folder}/etc/slurm.conf"})]
    bridge, refusal = bridge_name(number), refusal_of_namespaces()
    if not refusal:
        run_tool("ip", "netns", "add", f"{bridge}-1")
        run_tool("ip", "link", "add", bridge, "type", "bridge")
        cable = ("ip", "link", "add", f"{bridge}v1", "type", "veth", "peer", "name", "eth0")
        run_tool(*cable, "netns", f"{bridge}-1")
        left.append(subprocess.Popen(["ip", "netns", "exec", f"{bridge}-1", "sleep", "600"]))
        until(lambda: run_tool("ip", "netns", "pids", f"{bridge}-1"), 20, "the process in the namespace")
    try:
        with own_number() as again:
            assert again == number
            assert [process.wait(10) for process in left] == [-signal.SIGKILL] * len(left)
            assert not folder.exists()
            assert f"{bridge}-1" not in run_tool("ip", "netns", "list").split()
            assert f" {bridge}" not in run_tool("ip", "-o", "link")
            with own_number() as third:
                assert third != number
    finally:
        for process in left:
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_killed_run_gives_its_number_back() -> None:
    require_root()
    hold = (
        "import time; from tests.slurm.machine import own_number\n"
        "with own_number() as number: print(number, flush=True); time.sleep(600)"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", hold], cwd=root, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        number = int(process.stdout.readline())
        with own_number() as other:
            assert other != number
        process.kill()
    with own_number() as again:
        assert again <= number
