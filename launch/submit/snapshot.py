"""The code of a run as it was submitted: RUN/code/DIGEST, from which its jobs import, today and after any requeue."""

import json
from pathlib import Path

import launch
from pipeline import publish
from pipeline.errors import ToolError
from pipeline.tracking.starts import PACKAGES, commit_of

DIGEST_CHARACTERS = 12


def snapshot_code(run: Path) -> Path:
    """Copy this project's modules to RUN/code/DIGEST, unless they lie there, and return that folder.

    `commit.json` beside them names the commit they come from, the files that differ from it and in how many lines.

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
