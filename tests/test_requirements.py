"""A missing tool skips with its reason, or fails where everything is required: never anything else."""

import os
from pathlib import Path

import pytest

from tests import requirements


@pytest.fixture
def bare_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(requirements, "ADMIN_FOLDERS", ())
    return tmp_path


def test_missing_tool_skips_with_its_reason(bare_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LDM_REQUIRE_ALL", raising=False)
    with pytest.raises(
        pytest.skip.Exception, match=r"needs strace, which is not installed: apt-get install strace"
    ):
        requirements.require_tool("strace")


def test_missing_tool_fails_where_all_is_required(bare_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_REQUIRE_ALL", "1")
    with pytest.raises(pytest.fail.Exception, match=r"needs slurmd, .*slurm-wlm.*nothing may be left out"):
        requirements.require_tool("slurmd", "apt-get install slurm-wlm")


def test_tool_on_the_path_or_in_an_admin_folder_is_found(
    bare_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    admin = tmp_path_factory.mktemp("sbin")
    monkeypatch.setattr(requirements, "ADMIN_FOLDERS", (str(admin),))
    for folder, name in ((bare_path, "tool"), (admin, "daemon")):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
        assert requirements.require_tool(name) == folder / name


def test_root_is_asked_of_the_effective_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_REQUIRE_ALL", "0")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(pytest.skip.Exception, match="needs root, runs as user 1000"):
        requirements.require_root()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    requirements.require_root()


def test_forbidden_tool_is_left_out_with_what_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_REQUIRE_ALL", "1")
    requirements.require_command("/bin/sh", "-c", "exit 0")
    with pytest.raises(pytest.fail.Exception, match="but: Operation not permitted"):
        requirements.require_command("/bin/sh", "-c", "echo Operation not permitted >&2; exit 1")
