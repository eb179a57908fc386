"""A missing tool skips with its reason, or fails where everything is required: never anything else."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import requirements


@pytest.fixture
def bare_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(requirements, "ADMIN_FOLDERS", ())
    return tmp_path


def left_out(call: Callable[[], object]) -> tuple[str, str]:
    """Return how the call left the test out; a skip that got away would skip this test instead of failing it."""
    with pytest.raises((pytest.skip.Exception, pytest.fail.Exception)) as raised:
        call()
    return ("skipped" if raised.type is pytest.skip.Exception else "failed"), str(raised.value)


def test_missing_tool_skips_with_its_reason(bare_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LDM_REQUIRE_ALL", raising=False)
    outcome = left_out(lambda: requirements.require_tool("strace"))
    assert outcome == ("skipped", "needs strace, which is not installed: apt-get install strace")


def test_missing_tool_fails_where_all_is_required(bare_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_REQUIRE_ALL", "1")
    how, reason = left_out(lambda: requirements.require_tool("slurmd", "apt-get install slurm-wlm"))
    assert how == "failed"
    assert reason.startswith(
        "needs slurmd, which is not installed: apt-get install slurm-wlm (LDM_REQUIRE_ALL=1"
    )


def test_tool_on_the_path_or_in_an_admin_folder_is_found(
    bare_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    admin = tmp_path_factory.mktemp("sbin")
    monkeypatch.setenv("LDM_REQUIRE_ALL", "1")
    monkeypatch.setattr(requirements, "ADMIN_FOLDERS", (str(admin),))
    for folder, name in ((bare_path, "tool"), (admin, "daemon")):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
        assert requirements.require_tool(name) == folder / name


def test_root_is_asked_of_the_effective_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_REQUIRE_ALL", "0")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    how, reason = left_out(requirements.require_root)
    assert (how, reason.split(":")[0]) == ("skipped", "needs root, runs as user 1000")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    requirements.require_root()


def test_forbidden_tool_is_left_out_with_what_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_REQUIRE_ALL", "1")
    requirements.require_command("/bin/sh", "-c", "exit 0")
    forbidden = ("/bin/sh", "-c", "echo Operation not permitted >&2; exit 1")
    how, reason = left_out(lambda: requirements.require_command(*forbidden))
    assert how == "failed"
    assert "but: Operation not permitted" in reason
