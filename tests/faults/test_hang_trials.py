"""The judge of hangs against real ranks; twenty trials: `python -m tests.faults.hang_trials 20`."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.faults

ROOT = Path(__file__).parents[2]


@pytest.mark.covers("F11", "F12")
@pytest.mark.timeout(200)
def test_whoever_hangs_however_is_named() -> None:
    """Six trials: every fault once, rank 0 twice; in a process of its own, which forks after importing torch."""
    words = [sys.executable, "-m", "tests.faults.hang_trials", "6"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "right in 6 of 6 trials" in done.stdout
