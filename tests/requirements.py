"""The one rule for a test that the machine cannot run: skipped with its reason, or failed where all is required.

`LDM_REQUIRE_ALL=1` (set by `.ci/run`) turns every such skip into a failure, so that a green run there has run
everything. Call these from a fixture or from the test itself.
"""

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import NoReturn

import pytest

REQUIRE_ALL = "LDM_REQUIRE_ALL"
# Daemons live in folders that a user's PATH often leaves out.
ADMIN_FOLDERS = ("/usr/local/sbin", "/usr/sbin", "/sbin")


def leave_out(reason: str) -> NoReturn:
    """Skip the running test with `reason`, or fail it where `LDM_REQUIRE_ALL=1`."""
    if os.environ.get(REQUIRE_ALL) == "1":
        pytest.fail(f"{reason} ({REQUIRE_ALL}=1: nothing may be left out)", pytrace=False)
    pytest.skip(reason)


def require_tool(name: str, remedy: str = "") -> Path:
    """Return the path of the executable `name`; without it the running test is left out.

    `remedy` says how to get it; default: the Debian package of the same name.
    """
    folders = os.pathsep.join([os.environ.get("PATH", os.defpath), *ADMIN_FOLDERS])
    found = shutil.which(name, path=folders)
    if found is None:
        leave_out(f"needs {name}, which is not installed: {remedy or f'apt-get install {name}'}")
    return Path(found)


def require_root() -> None:
    """Leave the running test out unless it runs as root."""
    if os.geteuid() != 0:
        leave_out(f"needs root, runs as user {os.geteuid()}: run it in a container or with sudo")


@cache
def _said(command: tuple[str, ...]) -> str | None:
    """Return None where the command exits 0, otherwise the last line of what it said."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    lines = (done.stderr or done.stdout).strip().splitlines()
    return None if done.returncode == 0 else (lines[-1] if lines else f"exit code {done.returncode}")


def require_command(*command: str) -> None:
    """Leave the running test out unless the probe `command` exits 0: a tool can be there and be forbidden."""
    refusal = _said(command)
    if refusal is not None:
        leave_out(f"needs `{' '.join(command)}` to work, but: {refusal}")
