"""The code of a run as it was submitted: RUN/code/DIGEST, from which its jobs import, today and after any requeue."""

import json
import subprocess
from pathlib import Path

import launch
from pipeline import publish
from pipeline.errors import ToolError

PACKAGES = ("pipeline", "preprocessing", "launch")
DIGEST_CHARACTERS = 12
GIT_TIMEOUT_SECONDS = 20.0


def snapshot_code(run: Path) -> Path:
    """Copy this project's modules to RUN/code/DIGEST, unless they lie there, and return that folder.

    `commit.json` beside them names the commit they come from, and the files that differ from it.

    Raises:
        ToolError: when a module cannot be read.
    """
    root = Path(launch.__file__).resolve().parents[1]
    files = {
        path.relative_to(root).as_posix(): path
        for name in PACKAGES
        for path in sorted((root / name).rglob("*.py"))
    }
    try:
        payloads = {name: path.read_bytes() for name, path in files.items()}
    except OSError as error:
        raise ToolError(
            f"{error.filename}: the code cannot be copied to the run ({error.strerror})"
        ) from None
    digest = publish.json_digest({name: payload.hex() for name, payload in payloads.items()})
    folder = run / "code" / digest[:DIGEST_CHARACTERS]
    if folder.is_dir():
        return folder
    with publish.whole_folder(folder) as beside:
        for name, payload in payloads.items():
            (beside / name).parent.mkdir(parents=True, exist_ok=True)
            (beside / name).write_bytes(payload)
        facts = {"digest": digest, "copied_from": str(root), **commit_of(root)}
        (beside / "commit.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return folder


def commit_of(root: Path) -> dict[str, object]:
    """Return the commit of the clone at `root` and the files of this project changed since; None without git."""
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return {"commit": None, "changed": []}
    changed = _git(root, "status", "--porcelain", "--untracked-files=all", "--", *PACKAGES) or ""
    return {"commit": commit.strip(), "changed": [line[3:] for line in changed.splitlines()]}


def _git(root: Path, *words: str) -> str | None:
    command = ("git", "-C", str(root), "--no-optional-locks", *words)
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
