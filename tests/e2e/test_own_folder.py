"""From a folder of drawings that is not the example to a painted grid: `ldm init`, then `ldm demo` on what it wrote."""

import json
import os
import string
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from launch.demo import STAGES
from pipeline.latents.manifest import Manifest
from pipeline.tracking import read_records

ROOT = Path(__file__).parent.parent.parent
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

COLOURS = {"red": (200, 30, 30, 255), "blue": (30, 30, 200, 255)}
SHORT = (
    "first_stage.autoencoder.steps=40",
    "first_stage.clip.steps=30",
    "first_stage.clip.warmup_steps=5",
    "train.steps=40",
    "train.checkpoint_every=20",
    "train.log_every=5",
    "optimizer.warmup_steps=5",
    "ema.decay=0.9",
    "evaluate.timesteps=2",
    "sample.steps=5",
    "tracking.mlflow=off",
)


def write_glyphs(folder: Path) -> int:
    """Write letters and digits in two colours on nothing, each with its caption; return how many."""
    folder.mkdir()
    font = ImageFont.load_default(60)
    names = [(sign, colour) for sign in string.ascii_uppercase + string.digits for colour in COLOURS]
    for sign, colour in names:
        image = Image.new("RGBA", (80, 72), (0, 0, 0, 0))
        ImageDraw.Draw(image).text((40, 36), sign, font=font, fill=COLOURS[colour], anchor="mm")
        image.save(folder / f"{sign}-{colour}.png")
        (folder / f"{sign}-{colour}.txt").write_text(f"{colour} sign {sign}")
    return len(names)


def ldm(*arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "LDM_QUIET": "1"},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


def test_a_folder_becomes_a_painted_grid(tmp_path: Path) -> None:
    count = write_glyphs(tmp_path / "glyphs")
    (tmp_path / "glyphs" / "broken.png").write_bytes(b"no picture")
    (tmp_path / "glyphs" / "broken.txt").write_text("broken")
    said = ldm("init", "glyphs", "--device", "cpu", cwd=tmp_path)
    assert f"{count} usable" in said and "not_image 1" in said and "next      ldm demo glyphs.yaml" in said
    assert "ok" in ldm("check", "glyphs.yaml", cwd=tmp_path)
    said = ldm("demo", "glyphs.yaml", *SHORT, cwd=tmp_path)
    run = tmp_path / "runs" / "glyphs"
    assert set(json.loads((run / "demo.json").read_text())["stages"]) == {stage.name for stage in STAGES}
    counts = Manifest.load(run / "latents").counts
    assert (counts.read, counts.written, counts.rejected) == (count + 1, count, {"not_image": 1})
    losses = [record["loss"] for record in read_records(run / "metrics.jsonl", "train")]
    assert np.mean(losses[-2:]) < losses[0]
    grid = max((run / "samples").glob("step-*.png"))
    assert str(grid.relative_to(tmp_path)) in said
    assert np.asarray(Image.open(grid).convert("L"), float).std() > 3
