"""A run for CPU cores in minutes: own first stage, small pictures, as many visits of each concept as the time allows."""

from collections.abc import Sequence

from launch.init.captions import estimated_tokens
from launch.init.cost import (
    RECOGNISED,
    SATURATED,
    SHAPES,
    autoencoder_gflops,
    clip_gflops,
    features_gflops,
    network_gflops,
    other_seconds,
    stage_costs,
    step_seconds,
    trains_features,
    visits_words,
)
from launch.init.glance import spread
from launch.init.look import Facts
from launch.init.proposal import (
    USUAL_MINUTES,
    Choices,
    Machine,
    Proposal,
    choose_input,
    choose_shapes,
    input_notes,
    settled,
    shipped,
    validation_samples,
)
from launch.init.shapes import (
    Shapes,
    largest_size,
    rejected_by_size,
    smallest_side,
    widest_aspect,
)
from pipeline.config import RunConfig
from pipeline.errors import DataError

BASE = "demo.yaml"
PROMPTS = 16
"""Pictures in the grid."""
SIZES = (32, 64)
LARGE, LARGE_MINUTES = 128, 120
LATENT_SIDES = (8, 16)
"""Smallest and largest side of the latents: less keeps too little of a picture, more is too slow for cores."""
AUTOENCODER_SHARE, FEATURES_SHARE, CLIP_SHARE = 0.38, 0.038, 0.04
"""Of the time, as the demo gives it to its stages; the features' is a part of the autoencoder's."""
LEAST_JUDGED = 8
"""Validation pictures without which scores of painted pictures say nothing."""
LEAST_VISITS_A_PICTURE = 20
"""Where many pictures share a caption."""
LEAST_PAIRS = 8
MOST_PROCESSES = 8
SMALL_SET, SMALL_BATCH = 500, 16
ROOM = 4
"""max_tokens is a multiple of it."""
MOST_TOKENS = 77


def propose_for_cpu(facts: Facts, machine: Machine, name: str) -> Proposal:
    """Return the run for the cores of this machine.

    Raises:
        DataError: when there are too few usable pairs to train on.
    """
    if facts.usable < LEAST_PAIRS:
        raise DataError(
            f"{facts.source}: {facts.usable} usable pairs; at least {LEAST_PAIRS} are needed to train on"
        )
    base, choices = shipped(BASE), Choices()
    choose_input(choices, facts, name)
    size = _choose_size(choices, facts, machine)
    pairs = _choose_split(choices, facts)
    batch = _choose_batches(choices, base, machine, pairs)
    shapes = _choose_shapes(choices, base, facts, size, batch)
    _choose_first_stage(choices, base, facts, size, pairs)
    _choose_network(choices, base, size)
    _choose_prompts(choices, facts)
    visits = _choose_length(choices, settled(base, choices), facts, machine, pairs)
    config = settled(base, choices)
    notes = [*input_notes(facts), *_notes(config, facts, machine, visits, pairs)]
    costs = tuple(stage_costs(config, facts.usable, machine.cores))
    return Proposal(config, BASE, choices.reasons, tuple(notes), costs, None, shapes, visits)


def _choose_size(choices: Choices, facts: Facts, machine: Machine) -> int:
    headers = facts.headers
    large = (machine.minutes or USUAL_MINUTES) * machine.cores / 2 >= LARGE_MINUTES
    sizes = (*SIZES, LARGE) if large else SIZES
    size, share = largest_size(headers, sizes)
    most = f"{share:.0%} of the pictures are at least that large"
    limit = f"{sizes[-1]} px is what {machine.cores} cores can paint in the time"
    choices.set("encode.image_size", size, f"pixels; {most}" + (f"; {limit}" if size == sizes[-1] else ""))
    side, said = smallest_side(headers, size)
    choices.set("encode.min_side", side, f"pixels; {said}")
    aspect, said = widest_aspect(headers)
    choices.set("encode.max_aspect", aspect, said)
    return size


def _choose_split(choices: Choices, facts: Facts) -> int:
    """Choose the validation pairs; return how many are left for training."""
    rejected = rejected_by_size(
        facts.headers, choices.values["encode.min_side"], choices.values["encode.max_aspect"]
    )
    usable = round(facts.usable * (1 - sum(rejected.values()) / len(facts.headers)))
    kept = validation_samples(usable, 64)
    choices.set(
        "encode.validation_samples", kept, f"about a twentieth of the {usable:,} usable pairs, at most 64"
    )
    choices.set("encode.filters", [], "all that is usable")
    choices.set("evaluate.max_samples", max(1, kept), "the whole validation split")
    choices.set("evaluate.batch", max(1, kept), "in one batch")
    if kept < LEAST_JUDGED:
        choices.set(
            "evaluate.metrics", [], f"{kept} validation pictures are too few to judge painted ones by"
        )
    return usable - kept


def _choose_batches(choices: Choices, base: RunConfig, machine: Machine, pairs: int) -> int:
    engine = base.engine
    batch = min(engine.global_batch, SMALL_BATCH) if pairs < SMALL_SET else engine.global_batch
    while batch > max(2, pairs // 2):
        batch //= 2
    processes = min(max(1, machine.cores), batch, MOST_PROCESSES)
    if engine.processes * engine.threads == machine.cores and engine.processes <= batch:
        processes = engine.processes
    threads = max(1, machine.cores // processes)
    choices.set(
        "engine.global_batch", batch, f"{pairs:,} pairs: small batches give more steps in the same time"
    )
    choices.set("engine.processes", processes, f"of {machine.cores} cores, {threads} each")
    choices.set("engine.threads", threads, "CPU threads a process: all cores, none twice")
    micro = max(1, min(engine.micro_batch, batch // processes))
    choices.set("engine.micro_batch", micro, "a rank's part of the batch at once, memory is no limit here")
    return batch


def _choose_shapes(choices: Choices, base: RunConfig, facts: Facts, size: int, batch: int) -> Shapes:
    assert base.first_stage is not None
    widths = _autoencoder_widths(base, size)
    step = 2 ** (len(widths) - 1) * base.model.downsampling
    return choose_shapes(
        choices,
        facts,
        size=size,
        step=step,
        batch=batch,
        overflow="a small set loses no picture for its shape",
    )


def _autoencoder_widths(base: RunConfig, size: int) -> tuple[int, ...]:
    """Return the widths: a halving less or more than the demo's where its latents would be too small or too large."""
    assert base.first_stage is not None
    widths = base.first_stage.autoencoder.block_out_channels
    least, most = LATENT_SIDES
    while size // 2 ** (len(widths) - 1) < least:
        widths = widths[:-1]
    while size // 2 ** (len(widths) - 1) > most:
        widths = (*widths, widths[-1])
    return widths


def _choose_first_stage(choices: Choices, base: RunConfig, facts: Facts, size: int, pairs: int) -> None:
    assert base.first_stage is not None
    clip = base.first_stage.clip
    widths = _autoencoder_widths(base, size)
    factor = 2 ** (len(widths) - 1)
    choices.set(
        "first_stage.autoencoder.block_out_channels",
        list(widths),
        f"f{factor}: latents of {size // factor}x{size // factor}; more places keep more of a picture and cost visits",
    )
    patch = clip.patch if size >= 4 * clip.patch else max(1, size // 4)
    choices.set("first_stage.clip.patch", patch, f"{(size // patch) ** 2} patches a picture")
    tokens = estimated_tokens(facts.captions.all, clip.vocabulary)
    longest = min(MOST_TOKENS, -(-round(1.1 * max(tokens)) // ROOM) * ROOM)
    cut = sum(count > longest for count in tokens) / len(tokens)
    said = f"the longest caption takes about {max(tokens)} with start and end; a tenth more for certainty"
    choices.set("first_stage.clip.max_tokens", longest, said + (f"; about {cut:.1%} are cut" if cut else ""))
    words = facts.captions.distinct_words()
    choices.set(
        "first_stage.clip.vocabulary",
        clip.vocabulary,
        f"byte-pair entries; the captions have {words:,} different words",
    )
    batch = max(1, min(clip.batch, pairs // 2))
    choices.set(
        "first_stage.clip.batch",
        batch,
        f"the contrastive negatives, of {facts.concepts:,} different captions",
    )
    views = min(base.first_stage.autoencoder.perceptual.batch, batch)
    choices.set("first_stage.autoencoder.perceptual.batch", views, "pictures to tell apart at once")


def _choose_network(choices: Choices, base: RunConfig, size: int) -> None:
    assert base.first_stage is not None
    autoencoder, model = base.first_stage.autoencoder, base.model
    factor = 2 ** (len(choices.values["first_stage.autoencoder.block_out_channels"]) - 1)
    choices.set("model.sample_size", size // factor, f"{size} px / {factor}")
    for name in ("in_channels", "out_channels"):
        choices.set(f"model.{name}", autoencoder.latent_channels, "the autoencoder's latent channels")
    choices.set(
        "model.block_out_channels",
        list(model.block_out_channels),
        "the demo's: samples a second, not width, is what a short run lacks",
    )
    choices.set("model.cross_attention_dim", base.first_stage.clip.width, "first_stage.clip.width")


def _choose_prompts(choices: Choices, facts: Facts) -> None:
    """A short run paints what it has seen; what it makes of new captions is for `ldm sample`."""
    distinct = list(dict.fromkeys(facts.captions.all))
    shown = [distinct[place] for place in spread(len(distinct), PROMPTS)]
    choices.set("sample.prompts", shown, "captions from all over the folder: most of them are trained on")


def _choose_length(choices: Choices, config: RunConfig, facts: Facts, machine: Machine, pairs: int) -> float:
    """Choose all steps by the time there is; return the visits of each concept."""
    budget = (machine.minutes or USUAL_MINUTES) * 60
    free = max(0.2 * budget, budget - other_seconds(facts.usable, config.encode.image_size, machine.cores))
    spent = _choose_first_stage_length(choices, config, machine, pairs, free)
    _choose_processes(choices, config, machine)
    batch = config.engine.global_batch
    a_step = step_seconds("train", network_gflops(config), batch, machine.cores)
    concepts = min(facts.concepts, pairs)
    enough = max(SATURATED * concepts, LEAST_VISITS_A_PICTURE * pairs) / batch
    steps = _round(min((free - spent) / a_step, enough), 40)
    visits = steps * batch / concepts
    _choose_training(
        choices,
        config,
        steps,
        f"about {steps * a_step / 60:.1f} minutes; {visits:.0f} visits of each of {concepts:,} concepts",
    )
    return visits


def _choose_first_stage_length(
    choices: Choices, config: RunConfig, machine: Machine, pairs: int, free: float
) -> float:
    """Choose the steps of what is trained first, of `free` seconds for the whole; return the seconds it takes."""
    assert config.first_stage is not None
    autoencoder, clip, size = (
        config.first_stage.autoencoder,
        config.first_stage.clip,
        config.encode.image_size,
    )
    spent = 0.0
    if trains_features(autoencoder):
        network = autoencoder.perceptual
        a_step = step_seconds("features", features_gflops(network, size), network.batch, machine.cores)
        steps = _round(min(FEATURES_SHARE * free / a_step, network.steps), 10)
        spent = steps * a_step
        said = f"about {spent / 60:.1f} minutes, a tenth of the autoencoder's at most"
        choices.set("first_stage.autoencoder.perceptual.steps", steps, said)
    for stage, section, work, seconds in (
        ("autoencoder", autoencoder, autoencoder_gflops(autoencoder, size), AUTOENCODER_SHARE * free - spent),
        ("clip", clip, clip_gflops(clip, size), CLIP_SHARE * free),
    ):
        a_step = step_seconds(stage, work, section.batch, machine.cores)
        steps = _round(min(seconds / a_step, 3 * section.steps), 30)
        spent += steps * a_step
        said = f"about {steps * a_step / 60:.1f} minutes, {steps * section.batch / pairs:.0f} visits of each picture"
        warmup_steps = min(section.warmup_steps, steps // 10)
        key = f"first_stage.{stage}"
        choices.set(f"{key}.steps", steps, said)
        choices.set(f"{key}.warmup_steps", warmup_steps, "a tenth of the steps at most")
        choices.set(
            f"{key}.checkpoint_every", max(10, steps // 8), "an eighth of the steps: a kill costs little"
        )
    scaled = round(
        autoencoder.adversarial.start * choices.values["first_stage.autoencoder.steps"] / autoencoder.steps
    )
    choices.set(
        "first_stage.autoencoder.adversarial.start", scaled, "the same part of the steps as in the demo"
    )
    return spent


def _choose_processes(choices: Choices, config: RunConfig, machine: Machine) -> None:
    assert config.first_stage is not None
    autoencoder = config.first_stage.autoencoder
    batches = (autoencoder.batch, autoencoder.perceptual.batch, config.first_stage.clip.batch)
    sharing = max(
        count
        for count in range(1, min(machine.cores, MOST_PROCESSES) + 1)
        if all(batch % count == 0 for batch in batches)
    )
    choices.set(
        "first_stage.processes", sharing, "a core each as far as they share the batches: faster than threads"
    )


def _choose_training(choices: Choices, config: RunConfig, steps: int, said: str) -> None:
    choices.set("train.steps", steps, said)
    choices.set("train.checkpoint_every", max(10, steps // 8), "an eighth of the steps")
    choices.set(
        "train.log_every",
        max(1, min(config.train.log_every, steps // 20)),
        "at least twenty points of the curve",
    )
    choices.set(
        "optimizer.warmup_steps",
        min(config.optimizer.warmup_steps, steps // 10),
        "a tenth of the steps at most",
    )
    decay = round(min(config.ema.decay, 1 - 10 / steps), 4)
    choices.set(
        "ema.decay", decay, f"averages about {1 / (1 - decay):.0f} steps, a tenth of a short run at most"
    )


def _round(steps: float, least: int) -> int:
    """Return the steps with two significant digits, never more than there is time for."""
    whole = max(least, int(steps))
    unit = 10 ** max(0, len(str(whole)) - 2)
    return whole // unit * unit


def _notes(config: RunConfig, facts: Facts, machine: Machine, visits: float, pairs: int) -> Sequence[str]:
    minutes = machine.minutes or USUAL_MINUTES
    notes = []
    if visits < RECOGNISED:
        a_sample = step_seconds("train", network_gflops(config), 1, machine.cores)
        needed = (
            RECOGNISED * min(facts.concepts, pairs) * a_sample / (1 - AUTOENCODER_SHARE - CLIP_SHARE) / 60
        )
        fitting = int(min(facts.concepts, pairs) * visits / RECOGNISED)
        notes.append(
            f"{minutes} minutes give each of {facts.concepts:,} concepts {visits:.0f} visits: {visits_words(visits)}. "
            f"For {RECOGNISED} visits give --minutes {needed:.0f}, or a folder of about {fitting:,} pictures"
        )
    if visits < SHAPES and machine.device == "cpu" and facts.usable > 10_000:
        notes.append("so many pictures are work for GPUs: `ldm init --device gpu` proposes that")
    return notes
