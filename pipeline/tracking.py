"""Records of a run: one JSON line each in `metrics.jsonl`, which is the truth, then MLflow behind it.

The line is on its way to the disk before MLflow hears of it, and MLflow is fed from the file itself
(`pipeline.tracking_mlflow`, reached lazily): whatever happens to a tracking server, training neither waits
nor dies, and what it missed is sent when it answers again, at the next start, or by `ldm sync`.
"""

import json
import math
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from pipeline.config import RunConfig
from pipeline.errors import StoppedError
from pipeline.paths import RunPaths

Status = Literal["finished", "failed", "stopped"]
RECORD_FIELDS = frozenset({"time", "kind", "attempt", "step", "samples", "resumed_step", "nonfinite"})
CLOSE_SECONDS = 20.0

REDACTED = "[redacted]"
_PASSWORDS = (
    "password",
    "passwords",
    "passwd",
    "passphrase",
    "pwd",
    "secret",
    "secrets",
    "credential",
    "credentials",
)
_KEYS = ("token", "tokens", "key", "keys", "auth", "authorization", "bearer", "cookie")
_USERINFO = re.compile(r"(?<=://)(?:[^\s/?#]*@|[^\s/@]*:[^\s@]*@)")
_QUERY = re.compile(
    r"(?i)([?&;](?:[^\s=&;]*(?:token|key|secret|password|signature|credential|sig))=)[^\s&;#]+"
)
_KNOWN_TOKENS = re.compile(
    r"\b(?:hf_|gh[opsu]_|github_pat_|glpat-|sk-|xox[abprs]-|AKIA|ASIA)[A-Za-z0-9_-]{10,}"
)


class Sender(Protocol):
    """What carries records from `metrics.jsonl` to a tracking server, in the background."""

    def wake(self) -> None:
        """Say that `metrics.jsonl` has grown."""

    def file(self, path: Path, folder: str) -> None:
        """Hand over a file for the server's folder `folder`."""

    def close(self, status: Status, wait_seconds: float) -> int:
        """Send what is left for at most `wait_seconds`, end the run there; return how many records were not sent."""


class Records:
    """The open record book of one attempt; a context manager that closes itself with the right status."""

    def __init__(
        self, path: Path, *, kind: str, attempt: str, resumed_step: int = 0, sender: Sender | None = None
    ) -> None:
        self._kind, self._attempt, self._resumed_step = kind, attempt, resumed_step
        self._sender, self._rewinds = sender, 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        _end_torn_line(self._descriptor)

    def log(self, step: int, values: Mapping[str, float], *, samples: int | None = None) -> None:
        """Append one record of `values` at optimizer step `step`; a non-finite value becomes null and is named.

        One `write` a line, so that a kill leaves at most the last line torn and two writers never mix lines.
        """
        assert self._descriptor is not None, "log() after close()"
        assert not RECORD_FIELDS & values.keys(), f"a value may not be called {RECORD_FIELDS & values.keys()}"
        record: dict[str, Any] = {"time": time.time(), "kind": self._kind, "attempt": self._attempt}
        record |= {"step": int(step), "samples": samples}
        if self._resumed_step:
            record["resumed_step"] = self._resumed_step
        plain = {name: value if type(value) is int else float(value) for name, value in values.items()}
        record |= {name: value if math.isfinite(value) else None for name, value in plain.items()}
        nonfinite = sorted(name for name, value in plain.items() if not math.isfinite(value))
        if nonfinite:
            record["nonfinite"] = nonfinite
        os.write(self._descriptor, (json.dumps(record, allow_nan=False) + "\n").encode())
        if self._sender:
            self._sender.wake()

    def rewind(self, step: int) -> None:
        """Let the records that follow replace those after `step`, as a new attempt's would: the run has gone back."""
        self._rewinds += 1
        self._attempt = f"{self._attempt.partition('+')[0]}+{self._rewinds}"
        self._resumed_step = step

    def image(self, path: Path, step: int, name: str) -> None:
        """Keep the picture as `samples/NAME/FILE` on the tracking server, in a folder of its step if FILE has none."""
        named = f"{step:08d}" in path.name
        self.artifact(path, f"samples/{name}" if named else f"samples/{name}/step-{step:08d}")

    def artifact(self, path: Path, folder: str) -> None:
        """Keep the file as `FOLDER/FILE` on the tracking server; it must stay in place until it is sent."""
        if self._sender:
            self._sender.file(path, folder)

    def close(self, status: Status = "finished") -> None:
        """Force the records to the disk and give the tracking server at most 20 seconds to take the rest."""
        if self._descriptor is None:
            return
        os.fsync(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = None
        if self._sender:
            self._sender.close(status, CLOSE_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stopped = isinstance(error, StoppedError | KeyboardInterrupt)
        self.close("finished" if error is None else "stopped" if stopped else "failed")


class NoRecords(Records):
    """Records that go nowhere: for the ranks above 0."""

    def __init__(self) -> None:
        self._descriptor = None

    def log(self, step: int, values: Mapping[str, float], *, samples: int | None = None) -> None:
        """Do nothing: rank 0 writes."""

    def rewind(self, step: int) -> None:
        """Do nothing: rank 0 writes."""

    def artifact(self, path: Path, folder: str) -> None:
        """Do nothing: rank 0 writes."""


def open_records(
    paths: RunPaths, config: RunConfig, *, kind: str, attempt: str, resumed_step: int = 0
) -> Records:
    """Return the open records of one attempt at `kind` of work: "train", "autoencoder", "clip", "encode", ...

    `resumed_step` is the step of the checkpoint that the attempt starts from: later readers then know which
    records of earlier attempts it replaces.
    """
    sender = _open_sender(paths, config, kind)
    return Records(paths.metrics, kind=kind, attempt=attempt, resumed_step=resumed_step, sender=sender)


def read_records(path: Path, kind: str) -> list[dict[str, Any]]:
    """Return the records of `kind` in the order of their steps' truth: a later attempt replaces earlier ones.

    An attempt replaces every record after the step it resumed from. What a stale process of an older attempt
    still writes afterwards is left out. A torn last line is left out; damage elsewhere is left out and counted
    aloud.
    """
    records: list[dict[str, Any]] = []
    attempts: list[str] = []
    for record in _readable_records(path):
        if record["kind"] != kind:
            continue
        attempt = record["attempt"]
        if attempt not in attempts:
            attempts.append(attempt)
            resumed_step = record.get("resumed_step", 0)
            records = [earlier for earlier in records if earlier["step"] <= resumed_step]
        if attempt == attempts[-1]:
            records.append(record)
    return records


def parse_record(line: bytes) -> dict[str, Any] | None:
    """Return the record on one line of `metrics.jsonl`, or None if the line is not a whole record."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(record, dict) and isinstance(record.get("step"), int)
    return record if whole and {"time", "kind", "attempt"} <= record.keys() else None


def record_values(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite values of a record by name, without the fields that say when and by whom."""
    return {name: value for name, value in record.items() if name not in RECORD_FIELDS and value is not None}


def sync_records(paths: RunPaths, config: RunConfig, *, wait_seconds: float = 600.0) -> int:
    """Send what MLflow lacks of the run's `metrics.jsonl`; return how many records could not be sent."""
    records = _readable_records(paths.metrics)
    left = 0
    for kind in dict.fromkeys(record["kind"] for record in records):
        sender = _open_sender(paths, config, kind, live=False)
        if sender is None:
            return len(records)
        left += sender.close("finished", wait_seconds)
    return left


def tracking_uri(setting: str, runs: Path, environment: Mapping[str, str]) -> str | None:
    """Return where MLflow keeps records: a URI, or None for nowhere, after `tracking.mlflow` = `setting`.

    "auto" is a sqlite file in the folder of the runs, but nothing inside a Slurm job: sqlite on a shared file
    system is not safe with several writers.
    """
    if setting == "off" or (setting == "auto" and "SLURM_JOB_ID" in environment):
        return None
    return f"sqlite:///{runs.resolve() / 'mlflow.db'}" if setting == "auto" else setting


def redact(value: Any, name: str = "") -> Any:
    """Return `value` without secrets: what a telling name holds, userinfo in URIs, tokens known by their prefix."""
    if value is not None and not isinstance(value, bool) and _is_secret_name(name, value):
        return REDACTED
    if isinstance(value, Mapping):
        return {redact(str(key)): redact(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact(inner) for inner in value]
    return redact_text(value) if isinstance(value, str) else value


def redact_text(text: str) -> str:
    """Return `text` without the userinfo and secret query values of URIs and without well-known tokens."""
    text = _QUERY.sub(rf"\g<1>{REDACTED}", _USERINFO.sub(f"{REDACTED}@", text))
    return _KNOWN_TOKENS.sub(REDACTED, text)


def say(message: str) -> None:
    """Write one line for the user to stderr, without secrets."""
    print(f"tracking: {redact_text(' '.join(message.split()))}", file=sys.stderr, flush=True)


def _is_secret_name(name: str, value: Any) -> bool:
    """A number under `max_tokens` or `key` is a setting; a number under `password` is not."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name).lower()
    words = [word for word in re.split(r"[^a-z0-9]+", spaced) if word]
    if any(word.endswith(_PASSWORDS) for word in words):
        return True
    return not isinstance(value, int | float) and any(word.endswith(_KEYS) for word in words)


def _open_sender(paths: RunPaths, config: RunConfig, kind: str, *, live: bool = True) -> Sender | None:
    runs = Path(config.runs)
    uri = tracking_uri(config.tracking.mlflow, runs, os.environ)
    if uri is None:
        if config.tracking.mlflow == "auto":
            say(
                "inside a Slurm job records go to metrics.jsonl only; "
                "`ldm sync RUN` sends them to MLflow later, or set tracking.mlflow to a server's URI"
            )
        return None
    try:
        from pipeline.tracking_mlflow import MlflowSender
    except ImportError as error:
        say(
            f"MLflow does not import ({error}); records go to metrics.jsonl only, `ldm sync RUN` sends them later"
        )
        return None
    return MlflowSender(paths, config, kind, uri=uri, artifacts=runs.resolve() / "mlartifacts", live=live)


def _readable_records(path: Path) -> list[dict[str, Any]]:
    lines = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    # What follows the last newline is torn, or empty.
    parsed = [parse_record(line) for line in lines[:-1] if line]
    damaged = parsed.count(None)
    if damaged:
        say(f"{path}: {damaged} of {len(parsed)} lines are not whole records (cut off by a kill); left out")
    return [record for record in parsed if record is not None]


def _end_torn_line(descriptor: int) -> None:
    """Give a line that a kill cut off its end, so that the next record starts on a line of its own."""
    size_bytes = os.fstat(descriptor).st_size
    if size_bytes and os.pread(descriptor, 1, size_bytes - 1) != b"\n":
        os.write(descriptor, b"\n")
