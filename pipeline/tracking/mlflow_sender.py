"""Carries records and artifacts from a run folder to MLflow in a background thread.

The thread reads the files from their start and sends, of each metric, the steps above the last one that MLflow
already has. So a resumed run does not double the steps it replays (under promise P3 they are the same numbers), and
what an outage or a killed process left unsent follows by itself. After every failure MLflow is asked anew what it
has. One MLflow run stands for one (run folder, kind) across all resumes; its id is kept in the run folder.
"""

import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.config import RunConfig
from pipeline.paths import RunPaths
from pipeline.tracking.journal import Status, parse_record
from pipeline.tracking.mlflow_door import MlflowRun, Place
from pipeline.tracking.names import metrics_of
from pipeline.tracking.redaction import redact_text, say

ENDINGS: dict[Status, str] = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
LINES_A_BATCH = 200
SECONDS_BETWEEN_BATCHES = 1.0
LONGEST_PAUSE_SECONDS = 60.0


class Cursor:
    """A place in a file of JSON lines that moves over the entries of one kind of work."""

    def __init__(self, path: Path, kind: str) -> None:
        self._path, self._kind, self.offset_bytes = path, kind, 0

    def unsent(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield each whole entry behind the cursor, with the byte offset behind it.

        A line of which only a part is there yet is no entry, and is read again from its start next time.
        """
        if not self._path.is_file():
            return
        with self._path.open("rb") as stream:
            end_bytes = stream.seek(self.offset_bytes)
            for line in stream:
                end_bytes += len(line)
                entry = parse_record(line)
                if entry is not None and entry["kind"] == self._kind:
                    yield end_bytes, entry


class MlflowSender:
    """Feeds one MLflow run; every failure of MLflow ends in one warning and another try.

    A sender that is not `live` catches up for work that is over: it leaves the status of a known run alone.
    """

    def __init__(
        self, paths: RunPaths, config: RunConfig, kind: str, *, uri: str, artifacts: Path, live: bool = True
    ) -> None:
        self._place, self._live = Place(paths, config, kind, uri, artifacts), live
        self._records = [Cursor(path, kind) for path in (paths.metrics, paths.system)]
        self._artifacts = Cursor(paths.artifacts, kind)
        self._run: MlflowRun | None = None
        self._ends_run = live and not self._place.joins
        self._status: Status = "finished"
        self._wake, self._closing = threading.Event(), threading.Event()
        self._failing = False
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()
        self._wake.set()

    def wake(self) -> None:
        """Say that the files have grown; returns at once."""
        self._wake.set()

    def close(self, status: Status, wait_seconds: float) -> int:
        """Send what is left for at most `wait_seconds` and end the MLflow run; return the entries not sent."""
        self._status = status
        self._closing.set()
        self._wake.set()
        self._thread.join(wait_seconds)
        records = sum(1 for cursor in self._records for _ in cursor.unsent())
        files = sum(1 for _ in self._artifacts.unsent())
        if records or files or self._thread.is_alive():
            say(
                f"MLflow lacks up to {records} records and {files} files of {self._place.paths.root}; "
                "metrics.jsonl has all records, and the next start or `ldm sync RUN` sends them"
            )
        return records + files

    def _work(self) -> None:
        pause_seconds = SECONDS_BETWEEN_BATCHES
        while True:
            self._wake.wait()
            self._wake.clear()
            closing = self._closing.is_set()
            try:
                self._send()
                if closing:
                    self._end()
                self._recovered()
                pause_seconds = SECONDS_BETWEEN_BATCHES
            except Exception as error:  # whatever breaks in a tracking server must not reach the training
                self._warn(error)
                self._run = None
                pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)
                self._wake.set()
            if closing:
                return
            self._closing.wait(pause_seconds)

    def _send(self) -> None:
        if self._run is None:
            self._run = MlflowRun(self._place, running=self._live)
            self._ends_run = self._ends_run or self._run.was_made
        for cursor in self._records:
            while self._send_records(self._run, cursor):
                pass
        for end_bytes, entry in self._artifacts.unsent():
            self._send_artifact(self._run, entry)
            self._artifacts.offset_bytes = end_bytes

    def _send_records(self, run: MlflowRun, cursor: Cursor) -> bool:
        """Send up to 200 records; return whether there was anything to read. The place moves only on success."""
        batch = list(islice(cursor.unsent(), LINES_A_BATCH))
        run.send([(record["step"], int(record["time"] * 1000), metrics_of(record)) for _, record in batch])
        if batch:
            cursor.offset_bytes = batch[-1][0]
        return bool(batch)

    def _send_artifact(self, run: MlflowRun, entry: dict[str, Any]) -> None:
        path = self._place.paths.root / entry["path"]
        if not path.exists():
            say(f"{path}: is gone before MLflow took it; it is not kept there")
        elif entry["what"] == "image":
            run.keep_image(path, entry["name"], entry["step"], int(entry["time"] * 1000))
        elif entry["what"] == "model":
            run.register(path, entry["name"], entry["step"])
        else:
            run.keep_file(path, entry["name"])

    def _end(self) -> None:
        if self._run is not None and self._ends_run:
            self._run.end(ENDINGS[self._status])

    def _warn(self, error: Exception) -> None:
        if not self._failing:
            self._failing = True
            said = redact_text(" ".join(str(error).split()))[:300]
            say(
                f"MLflow fails ({type(error).__name__}: {said}); the run goes on, metrics.jsonl has every record"
            )

    def _recovered(self) -> None:
        if self._failing:
            self._failing = False
            say("MLflow answers again and has every record so far")
