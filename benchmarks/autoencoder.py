"""What each term of the autoencoder's loss does: held-out PSNR, SSIM and feature distance with each term off.

    pip install -e '.[judge]'
    python -m benchmarks.autoencoder ablation --out-dir FOLDER             # goes on where it was cut off
    python -m benchmarks.autoencoder ablation --out-dir FOLDER --only l1   # one line of the table

Every line is `ldm train-autoencoder` on the example data from the same seed; the distance is 1 - cosine between picture
and reconstruction in the features of a network that took no part (`benchmarks/judge`). A term whose absence changes none
of the three is a failure: exit code 1. Seconds are this process's core-seconds, measured when a line is trained in one go.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.judge.features import NAME, EfficientNetLite0
from pipeline.config import RunConfig
from pipeline.config_file import load_config
from pipeline.first_stage.autoencoder import REPORT, train_autoencoder
from pipeline.models.autoencoder import FrozenAutoencoder
from pipeline.models.model_folder import read_json
from pipeline.models.pixels import images_from_pixels, pixels_from_images
from pipeline.paths import RunPaths
from pipeline.publish import write_json
from preprocessing.pairs import PreparedPairs, prepared_pairs

REPOSITORY = Path(__file__).resolve().parents[1]
HELD_OUT = 128
AT = "first_stage.autoencoder"
EVERYTHING = {
    "crop": 32,
    "gradient_weight": 0.5,
    "kl_weight": 1e-4,
    "ema_decay": 0.995,
    "perceptual.weight": 0.2,
    "adversarial.weight": 0.2,
}
OFF: dict[str, dict[str, Any]] = {
    "everything": {},
    "no gradient L1": {"gradient_weight": 0.0},
    "no KL": {"kl_weight": 0.0},
    "no perceptual": {"perceptual.weight": 0.0},
    "no adversarial": {"adversarial.weight": 0.0},
    "no average": {"ema_decay": 0.0},
    "l1": {"gradient_weight": 0.0, "perceptual.weight": 0.0, "adversarial.weight": 0.0},
}
# Below all three a difference is taken for none.
PSNR_DB, SSIM, DISTANCE = 0.02, 5e-4, 1e-3


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    name: str
    psnr_db: float
    ssim: float
    distance: float
    latent_std: float
    core_seconds: float

    def markdown(self) -> str:
        """Return the line of the table."""
        return (
            f"| {self.name} | {self.psnr_db:.2f} | {self.ssim:.4f} | {self.distance:.4f} | {self.latent_std:.2f} "
            f"| {self.core_seconds:.0f} |"
        )


def main() -> int:
    """Print the table as it grows; exit code 1 when a term changes nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["ablation"])
    parser.add_argument("--out-dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--only", choices=list(OFF), default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = [options.only] if options.only else list(OFF)
    print(f"distance: 1 - cosine in {NAME}; {options.steps} steps, {HELD_OUT} held-out pictures")
    print(
        "| terms | PSNR dB | SSIM | distance | latents' std | core-seconds |\n|---|---:|---:|---:|---:|---:|"
    )
    lines = {}
    pairs = None
    for name in names:
        config = config_of(name, options.out_dir, options.steps)
        pairs = pairs or prepared_pairs(config.autoencoder_source)
        lines[name] = line_of(name, config, pairs)
        print(lines[name].markdown(), flush=True)
    return report_idle(lines) if not options.only else 0


def config_of(name: str, out_dir: Path, steps: int) -> RunConfig:
    """Return the demo's autoencoder with everything on but what `name` leaves out."""
    settings = {**EVERYTHING, **OFF[name]}
    overrides = [f"{AT}.{key}={value}" for key, value in settings.items()]
    overrides += [
        f"{AT}.steps={steps}",
        f"{AT}.adversarial.start={steps // 3}",
        f"{AT}.checkpoint_every=100",
        f"{AT}.log_every=20",
        f"encode.source={REPOSITORY / 'examples' / 'emoji'}",
        f"encode.validation_samples={HELD_OUT}",
        f"name={name.replace(' ', '-')}",
        f"runs={out_dir}",
        "tracking.mlflow=off",
    ]
    return load_config(REPOSITORY / "configs" / "small.yaml", overrides)


def line_of(name: str, config: RunConfig, pairs: PreparedPairs) -> Line:
    """Return the figures of one training, which is done now if it is not done yet."""
    paths = RunPaths(Path(config.runs) / config.name)
    timed = paths.root / "core_seconds.json"
    spent = read_json(timed)["seconds"] if timed.is_file() else 0.0
    started = time.process_time()
    folder = train_autoencoder(config, pairs, paths)
    if not timed.is_file():
        spent = time.process_time() - started
        write_json(timed, {"seconds": spent})
    report = read_json(folder / REPORT)
    distance = judged_distance(folder, pairs)
    return Line(name, report["psnr_db"], report["ssim"], distance, report["latent_std"], spent)


def judged_distance(folder: Path, pairs: PreparedPairs) -> float:
    """Return the mean of 1 - cosine between held-out pictures and their reconstructions in the judge's features."""
    pixels = np.stack([pair.image for pair in pairs if pair.split == "validation"])
    model = FrozenAutoencoder.load(folder)
    images_BCHW = images_from_pixels(pixels)
    decoded = [
        model.decode(model.encode(part)[:, : model.channels]).clamp(-1.0, 1.0)
        for part in images_BCHW.split(32)
    ]
    judge = EfficientNetLite0()
    cosine = (judge(pixels) * judge(pixels_from_images(torch.cat(decoded)))).sum(dim=1)
    return float(1.0 - cosine.mean())


def report_idle(lines: dict[str, Line]) -> int:
    """Return 1, and say which, when the absence of a term changes none of the three figures."""
    whole = lines["everything"]
    idle = [
        name
        for name, line in lines.items()
        if name != "everything"
        and abs(line.psnr_db - whole.psnr_db) < PSNR_DB
        and abs(line.ssim - whole.ssim) < SSIM
        and abs(line.distance - whole.distance) < DISTANCE
    ]
    print(f"changes nothing: {', '.join(idle)}" if idle else "every term changes something")
    return 1 if idle else 0


if __name__ == "__main__":
    sys.exit(main())
