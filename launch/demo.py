"""`ldm demo`: the main job on real images in seven stages, from source shards to an exported pipeline.

Each stage resumes by itself; a finished one is noted in RUN/demo.json with its digest and not run again. Two
runs of the same config on the same machine end with the same digests, however often they were killed.
"""

import hashlib
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.check import refuse_problems
from launch.local import run_local
from pipeline.config import RunConfig
from pipeline.config_file import dump_config, load_config
from pipeline.errors import ConfigError
from pipeline.evaluation.run import evaluate_run
from pipeline.export import export_pipeline
from pipeline.gallery.gallery import make_gallery
from pipeline.paths import RunPaths
from pipeline.publish import file_digest, folder_digest, json_digest, write_bytes, write_json
from pipeline.sample import sample_grid
from pipeline.tracking import config_for_later, read_records
from pipeline.training.saving.checkpoint import load_weights, newest_checkpoint
from preprocessing.encode_records import record_encoding
from preprocessing.finalize import finalize_dataset
from preprocessing.report import write_report
from preprocessing.verify import verify_dataset
from preprocessing.work import encode_dataset

logger = logging.getLogger(__name__)

GALLERY_PROMPTS = 4
FAST = (
    "name=demo-fast",
    "first_stage.autoencoder.perceptual.steps=20",
    "first_stage.autoencoder.steps=40",
    "first_stage.autoencoder.checkpoint_every=15",
    "first_stage.clip.steps=30",
    "first_stage.clip.batch=32",
    "first_stage.clip.checkpoint_every=10",
    "engine.processes=2",
    "engine.threads=1",
    "engine.zero_stage=1",
    "engine.global_batch=16",
    "engine.micro_batch=8",
    "train.steps=60",
    "train.checkpoint_every=20",
    "train.log_every=5",
    "optimizer.warmup_steps=10",
    "ema.decay=0.95",
    "evaluate.timesteps=4",
    "sample.steps=10",
)


@dataclass(frozen=True)
class Demo:
    """One run of the demo: its config and its folder."""

    config: RunConfig
    paths: RunPaths


@dataclass(frozen=True)
class Painted:
    """What a demo has come to, in words for its user and in facts."""

    words: str
    facts: dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """A part of the chain; `run` does it (or goes on with it) and returns the digest of what it made."""

    name: str
    title: str
    run: Callable[[Demo], str]


def _autoencoder(demo: Demo) -> str:
    _in_processes(demo, "train-autoencoder")
    return folder_digest(demo.paths.autoencoder)


def _clip(demo: Demo) -> str:
    _in_processes(demo, "train-clip")
    return json_digest([folder_digest(demo.paths.clip), folder_digest(demo.paths.text_encoder)])


def _encode(demo: Demo) -> str:
    config, paths = demo.config, demo.paths
    source = Path(config.encode.source)
    encode_dataset(
        config,
        source=source,
        out=paths.latents,
        autoencoder=paths.autoencoder,
        text_encoder=paths.text_encoder,
    )
    manifest = finalize_dataset(config, paths.latents, source)
    record_encoding(config, paths, paths.latents, manifest)
    result = verify_dataset(paths.latents, samples=None, decode_with=None)
    assert not result.problems, result.problems
    write_report(paths.latents, source, paths.autoencoder, config.encode.image_column)
    return manifest.digest


def _in_processes(demo: Demo, verb: str) -> None:
    """Run a training verb in as many processes as the config wants for it."""
    config, resolved = demo.config, demo.paths.root / "demo.yaml"
    write_bytes(resolved, dump_config(config_for_later(config)).encode())
    processes, threads = config.engine.processes, config.engine.threads
    if verb != "train" and config.first_stage:
        processes, threads = config.first_stage.processes, config.first_stage_threads
    code = run_local([sys.executable, "-m", "launch.cli", verb, str(resolved)], processes, threads=threads)
    if code:
        raise SystemExit(code)


def _train(demo: Demo) -> str:
    _in_processes(demo, "train")
    return weights_digest(newest_checkpoint(demo.paths.checkpoints))


def weights_digest(checkpoint: Path) -> str:
    """Return one sha256 over the names and bytes of the EMA weights in `checkpoint`, hexadecimal."""
    sha = hashlib.sha256()
    for name, tensor in sorted(load_weights(checkpoint, "ema").items()):
        sha.update(name.encode())
        sha.update(tensor.numpy().tobytes())
    return sha.hexdigest()


def _evaluate(demo: Demo) -> str:
    return json_digest(evaluate_run(demo.paths, demo.config))


def _sample(demo: Demo) -> str:
    grid = sample_grid(demo.paths, demo.config)
    make_gallery(demo.paths, demo.config, prompts_at_most=GALLERY_PROMPTS)
    return file_digest(grid)


def _export(demo: Demo) -> str:
    return folder_digest(export_pipeline(demo.paths, demo.config, weights="ema"))


STAGES = (
    Stage("autoencoder", "train the autoencoder", _autoencoder),
    Stage("clip", "train CLIP", _clip),
    Stage("encode", "encode, finalize and verify the data set", _encode),
    Stage("train", "train the U-Net", _train),
    Stage("evaluate", "evaluate", _evaluate),
    Stage("sample", "paint", _sample),
    Stage("export", "export the pipeline", _export),
)


def run_demo(path: Path, overrides: Sequence[str] = (), *, fast: bool = False) -> Painted:
    """Run every stage that is not done yet; return where the results lie and what each stage has made and taken.

    Raises:
        ConfigError: when the config is wrong, or the run folder was made with other settings.
    """
    config = load_config(path, [*(FAST if fast else ()), *overrides])
    paths = RunPaths(Path(config.runs) / config.name)
    refuse_problems(config, paths, str(path))
    demo = Demo(config, paths)
    done = _done_stages(demo)
    for number, stage in enumerate(STAGES, 1):
        head = f"[{number}/{len(STAGES)}] {stage.title}"
        if stage.name in done:
            logger.info("%s: done before (%.0f s)", head, done[stage.name]["seconds"])
            continue
        logger.info("%s", head)
        started = time.monotonic()
        digest = stage.run(demo)
        done[stage.name] = {"digest": digest, "seconds": round(time.monotonic() - started, 1)}
        write_json(_record(demo), {"config": _config_digest(config), "stages": done})
    return Painted(_closing_words(demo, done), {"run": paths.root, "stages": done})


def _record(demo: Demo) -> Path:
    return demo.paths.root / "demo.json"


def _config_digest(config: RunConfig) -> str:
    return json_digest(json.loads(config.model_dump_json()))


def _done_stages(demo: Demo) -> dict[str, dict]:
    """Return the finished stages of an earlier start of the same demo."""
    if not _record(demo).is_file():
        return {}
    record = json.loads(_record(demo).read_text())
    if record["config"] != _config_digest(demo.config):
        raise ConfigError(
            f"{demo.paths.root}: made with other settings; remove the folder, or give this run its own: name=demo-2"
        )
    return dict(record["stages"])


def _closing_words(demo: Demo, done: dict[str, dict]) -> str:
    paths, config = demo.paths, demo.config
    losses = [
        record["loss"] for record in read_records(paths.metrics, "train") if record.get("loss") is not None
    ]
    grid = max(paths.samples.glob("step-*.png"))
    mlflow = Path(sys.executable).with_name("mlflow")
    seconds = ", ".join(f"{name} {stage['seconds']:.0f} s" for name, stage in done.items())
    return "\n".join(
        [
            "",
            f"took       {seconds}",
            f"loss       {losses[0]:.3f} at the start, {losses[-1]:.3f} at the end of {config.train.steps} steps",
            f"grid       {grid}",
            f"gallery    {paths.gallery / grid.stem / 'index.html'}",
            f"report     {paths.latents / 'report.html'}",
            f"pipeline   {paths.export}  (StableDiffusionPipeline.from_pretrained)",
            f"curves     {mlflow} ui --backend-store-uri sqlite:///{config.runs}/mlflow.db",
        ]
    )
