"""`ldm check`: every problem of a config in under half a second, without torch, and what follows from it."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.config import RunConfig
from pipeline.config.engine import REFUSALS
from pipeline.config_file import load_config
from pipeline.data.shares import micro_batches_per_step
from pipeline.errors import ConfigError, DataError
from pipeline.latents.manifest import Manifest, mismatches
from pipeline.paths import RunPaths, dataset_folder, dataset_places
from pipeline.storage import is_remote
from pipeline.training.deepspeed_config import derive_deepspeed_config, hatch_problems


def check_config(path: Path, overrides: Sequence[str] = ()) -> str:
    """Return a page about the run described by `path`.

    Raises:
        ConfigError: with a line for each problem: keys, values, combinations, missing files, unfit data set.
    """
    config = load_config(path, overrides)
    paths = RunPaths(Path(config.runs) / config.name)
    refuse_problems(config, paths, str(path))
    return "\n".join([f"{path}: ok", *_facts(config, paths)])


def refuse_problems(config: RunConfig, paths: RunPaths, where: str) -> None:
    """Do nothing if the run can start.

    Raises:
        ConfigError: with a line for each impossible combination, missing file and unfit data set.
    """
    problems = [f"{where}: {line}" for line in [*combination_problems(config), *file_problems(config, paths)]]
    if problems:
        raise ConfigError(problems)


def refuse_untrainable(config: RunConfig, paths: RunPaths, where: str) -> None:
    """Do nothing if the training can start: asked once, before its ranks are.

    Raises:
        ConfigError: see `refuse_problems`.
        DataError: when there is no finished data set.
    """
    refuse_problems(config, paths, where)
    for folder in _local_datasets(config, paths):
        Manifest.load(folder)


def combination_problems(config: RunConfig) -> list[str]:
    """Return a line for each pair of settings that cannot go together."""
    lines = []
    world_size = max(config.engine.processes, config.cluster.nodes * config.cluster.tasks_per_node)
    if config.engine.global_batch < world_size:
        lines.append(
            f"engine.global_batch: {config.engine.global_batch} samples for {world_size} processes; every rank "
            f"needs one a step: at least {world_size}"
        )
    if config.optimizer.warmup_steps > config.train.steps:
        lines.append(
            f"optimizer.warmup_steps: {config.optimizer.warmup_steps} is more than train.steps {config.train.steps}; "
            "the learning rate would never arrive"
        )
    if config.model.addition_embed_type is not None and config.encode.text_encoder_2 is None:
        lines.append(
            "encode.text_encoder_2: null, but model.addition_embed_type 'text_time' (SDXL) takes its pooled text; give "
            "SDXL's second text folder"
        )
    lines += hatch_problems(config.engine.deepspeed)
    if config.first_stage:
        lines += _first_stage_problems(config)
    return lines


def _first_stage_problems(config: RunConfig) -> list[str]:
    assert config.first_stage
    autoencoder, clip, unet = config.first_stage.autoencoder, config.first_stage.clip, config.model
    lines = config.first_stage.batch_problems()
    for name, value in (("model.in_channels", unet.in_channels), ("model.out_channels", unet.out_channels)):
        if value != autoencoder.latent_channels:
            lines.append(
                f"{name}: {value}, but first_stage.autoencoder.latent_channels is {autoencoder.latent_channels}; make them equal"
            )
    if unet.cross_attention_dim != clip.width:
        lines.append(
            f"model.cross_attention_dim: {unet.cross_attention_dim}, but first_stage.clip.width is {clip.width}; make them equal"
        )
    factor = autoencoder.downsampling * unet.downsampling
    if config.encode.image_size % factor:
        nearest = max(factor, round(config.encode.image_size / factor) * factor)
        lines.append(
            f"encode.image_size: {config.encode.image_size} pixels; autoencoder and U-Net halve down to 1/{factor}, "
            f"so a multiple of {factor} is needed, e.g. {nearest}"
        )
    lines += _bucket_problems(config, factor)
    if autoencoder.crop is not None and autoencoder.crop > config.encode.image_size:
        lines.append(
            f"first_stage.autoencoder.crop: {autoencoder.crop} pixels, but encode.image_size is {config.encode.image_size}; "
            "give at most that, or null for whole pictures"
        )
    if config.encode.image_size % clip.patch:
        lines.append(
            f"first_stage.clip.patch: {clip.patch} does not divide encode.image_size {config.encode.image_size}"
        )
    return lines


def _bucket_problems(config: RunConfig, factor: int) -> list[str]:
    """Return a line for each shape that autoencoder and U-Net cannot halve down to 1/`factor`."""
    encode = config.encode
    need = f"autoencoder and U-Net halve down to 1/{factor}"
    if encode.bucket_step is not None and encode.bucket_step % factor:
        return [f"encode.bucket_step: {encode.bucket_step} pixels; {need}, so give a multiple of {factor}"]
    wrong = [shape for shape in encode.buckets or () if shape[0] % factor or shape[1] % factor]
    return [
        f"encode.buckets: {height} x {width} pixels; {need}, so both sides must be multiples of {factor}"
        for height, width in wrong
    ]


def file_problems(config: RunConfig, paths: RunPaths) -> list[str]:
    """Return a line for each input that is not there: an unfit data set, or where it is still to be made, its sources."""
    lines: list[str] = []
    datasets = _local_datasets(config, paths)
    made = [folder for folder in datasets if (folder / "manifest.json").is_file()]
    for folder in made:
        try:
            lines += [f"{folder}: {line}" for line in mismatches(Manifest.load(folder), config)]
        except DataError as error:
            lines.append(str(error))
    lines += _warm_start_problems(config) + _evaluation_problems(config, paths)
    if len(made) == len(datasets):
        return lines
    if not is_remote(config.encode.source) and not Path(config.encode.source).is_dir():
        lines.append(
            f"encode.source: {config.encode.source} is no folder; give the one with the image-caption shards"
        )
    for name in ("autoencoder", "text_encoder", "text_encoder_2"):
        folder = getattr(config.encode, name)
        if folder is None and name == "text_encoder_2":
            continue
        if folder is None and config.first_stage is None:
            lines.append(f"encode.{name}: null and no first_stage section trains one; give a local folder")
        elif folder is not None and not Path(folder).is_dir():
            lines.append(f"encode.{name}: {folder} is no folder; give a local diffusers/transformers folder")
    return lines


def _local_datasets(config: RunConfig, paths: RunPaths) -> list[Path]:
    """Return the folders of the data sets on this machine: what lies in a store is looked at when training begins."""
    return [Path(place) for place in dataset_places(config, paths) if not is_remote(place)]


def _warm_start_problems(config: RunConfig) -> list[str]:
    if config.warm_start is None or Path(config.warm_start.source).is_dir():
        return []
    return [
        f"warm_start.source: {config.warm_start.source} is no folder; give a run, a checkpoint or a diffusers folder"
    ]


def _evaluation_problems(config: RunConfig, paths: RunPaths) -> list[str]:
    """Return a line for each network or folder that the metrics of pictures name and that is not there."""
    settings, lines = config.evaluate, []
    has_clip = config.first_stage is not None or paths.clip.is_dir()
    for name, metrics in (("features", {"kid", "frechet", "precision_recall"}), ("clip", {"clip"})):
        place = getattr(settings, name)
        if place is None and metrics & set(settings.metrics) and not has_clip:
            lines.append(
                f"evaluate.{name}: null, and this run trains no CLIP; give a local CLIP folder, or no such metrics"
            )
        elif place is not None and not Path(place).exists():
            lines.append(f"evaluate.{name}: {place} is not there; give a local CLIP folder")
    if settings.reference is not None and not Path(settings.reference).is_dir():
        lines.append(
            f"evaluate.reference: {settings.reference} is no folder; give one with pictures, or null"
        )
    return lines


def _facts(config: RunConfig, paths: RunPaths) -> list[str]:
    engine = config.engine
    world_size = max(engine.processes, config.cluster.nodes * config.cluster.tasks_per_node)
    micro_batches = micro_batches_per_step(engine.global_batch, engine.micro_batch, world_size)
    dataset = dataset_folder(config, paths)
    made = (dataset / "manifest.json").is_file()
    on_gpus = config.cluster.gpus_per_node > 0
    derived = derive_deepspeed_config(engine, config.optimizer, world_size, micro_batches, on_gpus=on_gpus)
    split = f"{world_size} ranks x {micro_batches} micro-batches of up to {engine.micro_batch}"
    return [
        f"  run folder     {paths.root}",
        f"  data set       {dataset}{'' if made else ': not made yet, by `ldm encode` and `ldm finalize`'}",
        f"  a step         {engine.global_batch} samples = {split}",
        f"  the training   {config.train.steps} steps = {config.train.steps * engine.global_batch} samples",
        f"  deepspeed      {derived}",
        *(f"  never          {refusal}" for refusal in REFUSALS),
    ]
