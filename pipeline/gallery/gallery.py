"""All sheets of one run in a folder, with a page that shows them: `gallery/step-XXXXXXXX/`."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline import publish
from pipeline.config import RunConfig
from pipeline.errors import ConfigError
from pipeline.gallery.learning import learning_sheet
from pipeline.gallery.paintings import SCALES, attention_sheet, guidance_sheet, weights_sheet, x0_sheet
from pipeline.gallery.sheet import Sheet, draw_sheet, gallery_page
from pipeline.generate import Generator
from pipeline.paths import RunPaths
from pipeline.progress import progress_bar
from pipeline.sample import chosen_prompts, grid_record
from pipeline.tracking import open_records
from pipeline.trained_network import TrainedNetwork

SHEETS = 5
PAGE, RECORD = "index.html", "gallery.json"


def make_gallery(
    paths: RunPaths, config: RunConfig, *, prompts_at_most: int = 6, scales: Sequence[float] = SCALES
) -> Path:
    """Paint the first prompts of `config.sample` in every way; return the page `gallery/step-XXXXXXXX/index.html`.

    Beside it lie the sheets as PNG and `gallery.json`, which says how they were made. The folder appears whole, in place
    of an older one of the same step.

    Raises:
        CheckpointError: when there is no valid checkpoint.
        ConfigError: when there are no prompts and no validation captions to take instead, or no such weights.
        DataError: when the encoders do not belong to the training's data.
    """
    sample = config.sample
    generator = Generator.load(paths, sample.weights)
    trained = generator.trained
    prompts = chosen_prompts(trained.config, paths, config)[:prompts_at_most]
    with progress_bar(SHEETS, "gallery", unit="sheet") as progress:
        sheets = []
        for sheet in _sheets(paths, generator, prompts, config, scales):
            sheets += [sheet] if sheet else []
            progress.advance(1)
    folder = paths.gallery / f"step-{trained.step:08d}"
    about = (
        f"{trained.weights} weights of step {trained.step:,}; {sample.sampler}, {sample.steps} steps, seed {sample.seed}, "
        f"guidance {sample.guidance_scale:g} where nothing else is said."
    )
    with publish.whole_folder(folder) as beside:
        for sheet in sheets:
            draw_sheet(sheet).save(beside / f"{sheet.name}.png", format="PNG")
        record = grid_record(generator, config, prompts) | {"sheets": [sheet.name for sheet in sheets]}
        publish.write_json(beside / RECORD, record | {"scales": list(scales)})
        page = gallery_page(paths.root.name, about, sheets)
        publish.write_bytes(beside / PAGE, page.encode())
    with open_records(paths, config, kind="sample", attempt="gallery") as records:
        for sheet in sheets:
            records.image(folder / f"{sheet.name}.png", trained.step, f"gallery_{sheet.name}")
    return folder / PAGE


def guidance_scales(text: str) -> tuple[float, ...]:
    """Return the scales of a list such as "1,3,7.5".

    Raises:
        ConfigError: when it is not a list of numbers from 0 up.
    """
    try:
        scales = tuple(float(part) for part in text.split(","))
    except ValueError:
        scales = ()
    if not scales or not all(math.isfinite(scale) and scale >= 0 for scale in scales):
        raise ConfigError(f"--scales: {text!r}; give numbers from 0 up with commas, for instance 1,3,7.5")
    return scales


def _sheets(
    paths: RunPaths, generator: Generator, prompts: Sequence[str], config: RunConfig, scales: Sequence[float]
) -> Iterator[Sheet | None]:
    """Yield the sheets one after the other; None where a run has nothing for one yet."""
    sample = config.sample
    yield learning_sheet(paths, len(prompts))
    kinds = dict.fromkeys(("raw", generator.trained.weights))
    networks = TrainedNetwork.each(paths, tuple(kinds), generator.device)
    yield weights_sheet((generator.under(trained) for trained in networks), prompts, sample)
    yield guidance_sheet(generator, prompts, sample, scales)
    yield x0_sheet(generator, prompts, sample)
    yield attention_sheet(generator, prompts, sample)
