"""A run for GPUs in hours: published frozen encoders, a U-Net as wide as the number of pictures supports."""

import math
from dataclasses import dataclass

from launch.init.captions import PIECES
from launch.init.cost import GpuCost, gpu_cost, visits_words
from launch.init.look import Facts
from launch.init.proposal import (
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
from launch.init.shapes import Shapes, reaching, smallest_side, widest_aspect
from pipeline.config import RunConfig

LARGE_SHARE, LARGE_SET = 0.6, 100_000
MOST_VISITS, VISITS_SET, LEAST_VISITS = 400, 10_000, 5
"""400 visits to paint single concepts (the demo's table); what is general is learnt from many pictures with fewer each:
taken in proportion to one over the root of their number, a rule of thumb; SD 1.x saw LAION's about half a time."""
MOST_EMBEDDINGS_BYTES = 500e9
EMBEDDING_BYTES = 77 * 768 * 2
CLIP_TOKENS = 77
TOKENS_A_PIECE = 1.3
"""Of CLIP's vocabulary of 49,408, for a word of English; other languages take more."""
FEW_STEPS = 500


@dataclass(frozen=True)
class Tier:
    """What a number of pictures supports."""

    samples: int
    """Below it."""
    widths: tuple[int, ...]
    global_batch: int


TIERS = (
    Tier(10_000, (128, 256, 384, 512), 128),
    Tier(100_000, (192, 384, 576, 768), 256),
    Tier(1_000_000, (256, 512, 1024, 1024), 1024),
)
"""Rules of thumb, held against nothing here; above a million the published SD 1.x as it is."""


def propose_for_gpu(facts: Facts, machine: Machine, name: str) -> Proposal:
    """Return the run for a node of GPUs."""
    large = reaching(facts.headers, 512) >= LARGE_SHARE and facts.usable >= LARGE_SET
    base_name = "sd15-512.yaml" if large else "sd15-256.yaml"
    base, choices = shipped(base_name), Choices()
    choose_input(choices, facts, name)
    size = base.encode.image_size
    share = reaching(facts.headers, size)
    why = f"{share:.0%} of the pictures are at least that large"
    if not large:
        why += f"; 512 wants {LARGE_SHARE:.0%} of that size and {LARGE_SET:,} of them, or a second stage (docs/recipes.md)"
    choices.set("encode.image_size", size, f"pixels; {why}")
    _choose_encoding(choices, facts, size)
    batch = _choose_network(choices, base, facts, machine)
    shapes = _choose_shapes(choices, base, facts, size, batch)
    visits, cost = _choose_length(choices, base, facts, machine)
    notes = [*input_notes(facts), *_notes(facts, machine, size, visits)]
    config = settled(base, choices)
    return Proposal(config, base_name, choices.reasons, tuple(notes), (), cost, shapes, visits)


def _choose_encoding(choices: Choices, facts: Facts, size: int) -> None:
    choices.set("data.dataset", None, "RUN/latents, made by `ldm encode` and `ldm finalize`")
    choices.set(
        "encode.autoencoder",
        "models/sd-vae",
        "FILL IN: a local diffusers folder of an f8 autoencoder with 4 channels",
    )
    choices.set(
        "encode.text_encoder",
        "models/clip-vit-large-patch14",
        "FILL IN: a local transformers folder of CLIP ViT-L/14",
    )
    side, said = smallest_side(facts.headers, size)
    choices.set("encode.min_side", side, f"pixels; {said}")
    aspect, said = widest_aspect(facts.headers)
    choices.set("encode.max_aspect", aspect, said)
    kept = validation_samples(facts.usable, 1024)
    choices.set(
        "encode.validation_samples",
        kept,
        f"about a twentieth of {facts.usable:,} usable pairs, at most 1,024",
    )
    stored = facts.usable * choices.values["encode.max_captions"] * EMBEDDING_BYTES
    text = "tokens" if stored > MOST_EMBEDDINGS_BYTES else "embeddings"
    choices.set(
        "encode.text",
        text,
        f"embeddings take {stored / 1e9:,.1f} GB here; tokens 154 B a caption and 2.5 % of a step at 256 px",
    )
    choices.set("evaluate.max_samples", max(1, kept), "the whole validation split")
    choices.set("sample.prompts", [], "captions of the validation split")


def _choose_network(choices: Choices, base: RunConfig, facts: Facts, machine: Machine) -> int:
    tier = next((tier for tier in TIERS if facts.usable < tier.samples), None)
    widths = base.model.block_out_channels if tier is None else tier.widths
    batch = base.engine.global_batch if tier is None else tier.global_batch
    said = (
        f"for {facts.usable:,} pictures; a wider one learns them by heart (rule of thumb)"
        if tier
        else "SD 1.x as published"
    )
    choices.set("model.block_out_channels", list(widths), said)
    choices.set(
        "engine.global_batch",
        batch,
        f"for {facts.usable:,} pictures; the published 2048 is for hundreds of millions",
    )
    choices.set("engine.processes", machine.gpus, "one a GPU")
    choices.set(
        "engine.micro_batch",
        min(base.engine.micro_batch, max(1, batch // machine.gpus)),
        "a rank's part at once",
    )
    choices.set("cluster.nodes", 1, "one node; `ldm plan` says what more would bring")
    choices.set("cluster.tasks_per_node", machine.gpus, "one rank a GPU")
    choices.set("cluster.gpus_per_node", machine.gpus, "as found here, else the usual 8")
    choices.set("cluster.encode_nodes", 1, "one node encodes and trains")
    return batch


def _choose_shapes(choices: Choices, base: RunConfig, facts: Facts, size: int, batch: int) -> Shapes:
    step = 8 * base.model.downsampling
    return choose_shapes(
        choices, facts, size=size, step=step, batch=batch, overflow="what no shape fits is cropped"
    )


def _choose_length(
    choices: Choices, base: RunConfig, facts: Facts, machine: Machine
) -> tuple[float, GpuCost]:
    """Choose the steps by visits, and by the time where one is given; return visits and cost."""
    batch = choices.values["engine.global_batch"]
    pairs = max(1, facts.usable - choices.values["encode.validation_samples"])
    wanted = max(LEAST_VISITS, MOST_VISITS * min(1.0, math.sqrt(VISITS_SET / pairs)))
    steps = max(FEW_STEPS, round(wanted * pairs / batch))
    cost = gpu_cost(_with_steps(choices, base, steps), pairs, machine.gpus)
    said = f"{wanted:.0f} visits of each of {pairs:,} pictures (rule of thumb between the demo's 400 and published runs)"
    if machine.minutes is not None:
        hours = machine.minutes * machine.gpus / 60
        fitting = int(steps * max(0.0, hours - cost.encode_hours) / max(1e-9, cost.train_hours))
        if fitting < steps:
            steps = max(FEW_STEPS, fitting)
            said = f"what {machine.minutes} minutes of {machine.gpus} GPUs give by estimate; {wanted:.0f} visits would be better"
            cost = gpu_cost(_with_steps(choices, base, steps), pairs, machine.gpus)
    choices.set("train.steps", steps, said)
    return steps * batch / pairs, cost


def _with_steps(choices: Choices, base: RunConfig, steps: int) -> RunConfig:
    choices.set("train.steps", steps, "")
    choices.set(
        "optimizer.warmup_steps",
        min(base.optimizer.warmup_steps, steps // 10),
        "a tenth of the steps at most",
    )
    every = max(50, min(base.train.checkpoint_every, steps // 20))
    choices.set("train.checkpoint_every", every, "minutes of work at most are lost to a kill")
    return settled(base, choices)


def _notes(facts: Facts, machine: Machine, size: int, visits: float) -> list[str]:
    notes = [
        "fill in encode.autoencoder and encode.text_encoder: two local folders; `ldm check` says when they are found"
    ]
    if reaching(facts.headers, size) < 0.5:
        notes.append(
            f"{1 - reaching(facts.headers, size):.0%} of the pictures are smaller than {size} px and are enlarged: they stay soft"
        )
    if facts.usable < VISITS_SET:
        notes.append(
            f"{facts.usable:,} pictures are few for a network from scratch; start from a published one: "
            "`ldm import FOLDER CONFIG` (docs/recipes.md, Other data, same model)"
        )
    long = sum(TOKENS_A_PIECE * len(PIECES.findall(text)) > CLIP_TOKENS for text in facts.captions.all)
    if long:
        notes.append(
            f"{long / len(facts.captions.all):.0%} of the captions are about longer than CLIP's {CLIP_TOKENS} tokens and are cut"
        )
    if visits < LEAST_VISITS:
        notes.append(f"{visits:.1f} visits of each picture: {visits_words(visits)}")
    return notes
