"""The whole chain on real images: killed in each of its seven stages, it ends with the same digests."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from launch.demo import STAGES
from pipeline.latents.manifest import Manifest
from pipeline.tracking import read_records

ROOT = Path(__file__).parent.parent.parent
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]


def start(runs: Path) -> subprocess.Popen[str]:
    log = (runs / "out.txt").open("a")
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "demo", "--fast", f"runs={runs}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "2", "PYTHONUNBUFFERED": "1"},
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(runs: Path) -> None:
    code = start(runs).wait(timeout=900)
    assert code == 0, (runs / "out.txt").read_text()[-4000:]


def stage_begun(runs: Path, number: int) -> bool:
    title = f"[{number}/{len(STAGES)}] {STAGES[number - 1].title}\n"
    return title in (runs / "out.txt").read_text()


def half_way(runs: Path) -> dict[str, Callable[[], bool]]:
    """Return for each stage how to see that it has done a part of its work."""
    run = runs / "demo-fast"

    def later(number: int) -> Callable[[], bool]:
        seen: list[float] = []

        def ready() -> bool:
            if stage_begun(runs, number):
                seen.append(time.monotonic())
            return bool(seen) and time.monotonic() - seen[0] > 0.3

        return ready

    return {
        "autoencoder": lambda: any((run / "first_stage" / "autoencoder").glob("step-*")),
        "clip": lambda: any((run / "first_stage" / "clip").glob("step-*")),
        "encode": lambda: (run / "latents" / "00" / "00000.json").exists(),
        "train": lambda: any((run / "checkpoints").glob("step-*")),
        "evaluate": later(5),
        "sample": later(6),
        "export": later(7),
    }


def descendants(pid: int) -> set[int]:
    """Return all processes below `pid`, read from /proc."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    found, grown = {pid}, True
    while grown:
        more = {child for child, parent in parents.items() if parent in found} | found
        grown, found = len(more) > len(found), more
    return found - {pid}


def kill_when(runs: Path, name: str, ready: Callable[[], bool]) -> None:
    process = start(runs)
    deadline = time.monotonic() + 600
    while not ready():
        assert process.poll() is None, (
            f"ended before it could be killed in {name}: {(runs / 'out.txt').read_text()[-3000:]}"
        )
        assert time.monotonic() < deadline, name
        time.sleep(0.02)
    children = descendants(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, f"orphans of {name} live on"
        time.sleep(0.1)


def demo_record(runs: Path) -> dict:
    return json.loads((runs / "demo-fast" / "demo.json").read_text())["stages"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("undisturbed")
    finish(runs)
    return runs


def test_killed_in_every_stage_ends_with_the_same_digests(undisturbed: Path, tmp_path: Path) -> None:
    for name, ready in half_way(tmp_path).items():
        kill_when(tmp_path, name, ready)
        done = demo_record(tmp_path) if (tmp_path / "demo-fast" / "demo.json").exists() else {}
        assert name not in done, f"{name} was over before the kill"
    finish(tmp_path)
    expected = {name: stage["digest"] for name, stage in demo_record(undisturbed).items()}
    found = {name: stage["digest"] for name, stage in demo_record(tmp_path).items()}
    assert set(expected) == {stage.name for stage in STAGES}
    assert found == expected


def test_it_says_where_everything_lies_and_that_is_so(undisturbed: Path) -> None:
    run = undisturbed / "demo-fast"
    words = (undisturbed / "out.txt").read_text()
    grid = max((run / "samples").glob("step-*.png"))
    for place in (grid, run / "latents" / "report.html", run / "pipeline"):
        assert str(place) in words and place.exists()
    assert f"sqlite:///{undisturbed}/mlflow.db" in words and (undisturbed / "mlflow.db").exists()
    assert np.asarray(Image.open(grid).convert("L"), float).std() > 5


def test_nothing_was_lost_and_the_loss_fell(undisturbed: Path) -> None:
    run = undisturbed / "demo-fast"
    manifest = Manifest.load(run / "latents")
    counts = manifest.counts
    assert counts.read == 2126 == counts.written + sum(counts.rejected.values()) and not counts.failed
    assert set(counts.rejected) == {"held_out", "other_subject"}
    assert manifest.splits == {"train": 135, "validation": 8}
    losses = [record["loss"] for record in read_records(run / "metrics.jsonl", "train")]
    assert np.mean(losses[-3:]) < 0.9 * losses[0]
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert 0 < evaluation["ema"]["loss"] < 1.2


def test_diffusers_loads_and_paints_with_the_exported_folder(undisturbed: Path) -> None:
    folder = undisturbed / "demo-fast" / "pipeline"
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(
        "red apple, food and drink",
        num_inference_steps=5,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images[0]
    assert picture.shape == (64, 64, 3) and np.isfinite(picture).all() and picture.std() > 0.01
