"""`ldm train-clip`: a small CLIP from prepared pairs, whose text tower conditions the U-Net.

Symmetric cross-entropy over the similarities of the global batch with a learnt temperature (Radford et al. 2021,
figure 3); pairs of equal captions are no negatives of each other. Shape letters: B this process's share, G global
batch, D width, L tokens.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config import ClipConfig, RunConfig
from pipeline.errors import ConfigError
from pipeline.first_stage import resume
from pipeline.first_stage.loop import Recipe, Stage, StepLoss, fit, start_accelerator
from pipeline.first_stage.measure import MEASURE_BATCH, retrieval
from pipeline.first_stage.pairs import DistinctOrder, PairTable, PreparedPair, read_pairs, share
from pipeline.models.pixels import images_from_pixels
from pipeline.models.text_encoder import (
    CLIPModel,
    CLIPTokenizer,
    build_clip,
    save_clip,
    text_encoder_digest,
    tokenize,
    tokenizer_digest,
    train_tokenizer,
)
from pipeline.paths import RunPaths
from pipeline.publish import whole_folder, write_json

KIND = "clip"
REPORT = "clip.json"
# exp(scale) <= 100, as in CLIP: a hotter softmax makes the loss unstable.
MAX_LOGIT_SCALE = math.log(100.0)
RETRIEVAL_PAIRS = 128


def train_clip(config: RunConfig, pairs: Sequence[PreparedPair], paths: RunPaths) -> Path:
    """Return `paths.clip`, a transformers CLIP folder with `clip.json`, after training what is left to do.

    `paths.text_encoder` then holds the text tower and the tokenizer. Killed and called again it goes on from the
    newest whole checkpoint and ends with the same bits as a straight run; finished folders return at once.

    Raises:
        ConfigError: without `first_stage`, with fewer training pairs than a batch has, or when the folders or
            the checkpoints belong to others.
    """
    if config.first_stage is None:
        raise ConfigError("first_stage: null, so there is nothing to train; add first_stage.clip")
    section = config.first_stage.clip
    table = read_pairs(pairs, config.encode.image_size)
    if len(table.train) < section.batch:
        raise ConfigError(
            f"first_stage.clip.batch {section.batch} is more than the {len(table.train)} training pairs: give at "
            f"most that many"
        )
    tokenizer = train_tokenizer(
        [table.captions[place] for place in table.train], section.vocabulary, section.max_tokens
    )
    stage = Stage(
        config=config,
        paths=paths,
        accelerator=start_accelerator(section.batch, "first_stage.clip.batch"),
        recipe=_recipe(section),
        settings={
            **section.model_dump(mode="json", exclude={"checkpoint_every", "log_every"}),
            "image_size": config.encode.image_size,
            "seed": config.seed,
            "pairs": table.digest,
            "tokenizer": tokenizer_digest(tokenizer),
        },
    )
    finished = [
        resume.is_finished(folder, REPORT, stage.settings) for folder in (paths.clip, paths.text_encoder)
    ]
    if not all(finished):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = build_clip(section, config.encode.image_size, tokenizer)
        noted = fit(
            stage,
            ClipTowers(model),
            _step_loss(stage, section, table, tokenizer),
            lambda: clamp_temperature(model),
        )
        if stage.accelerator.is_main_process:
            _publish(stage, model.eval(), tokenizer, table, noted)
    if stage.accelerator.is_main_process:
        resume.clear(stage.checkpoints, paths.clip)
        resume.clear(stage.checkpoints, paths.text_encoder)
    stage.accelerator.wait_for_everyone()
    return paths.clip


class ClipTowers(nn.Module):
    """A CLIP as the trainer sees it: images and tokens in, unit embeddings and temperature out."""

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_BCHW: Tensor, tokens_BL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return image and text embeddings [B, D] of unit length, and the scalar that multiplies similarities."""
        found = self.model(input_ids=tokens_BL, pixel_values=images_BCHW)
        return found.image_embeds, found.text_embeds, self.model.logit_scale.exp()


def contrastive_loss(image_GD: Tensor, text_GD: Tensor, scale: Tensor, caption_ids_G: Tensor) -> Tensor:
    """Return the symmetric cross-entropy, a scalar: each picture's own caption among all, and the reverse.

    Other pairs with an equal caption are neither right nor wrong: they are left out of the softmax.
    Source: Radford et al. 2021, figure 3.
    """
    logits_GG = scale * text_GD @ image_GD.T
    same_GG = caption_ids_G[:, None] == caption_ids_G[None, :]
    same_GG.fill_diagonal_(False)
    logits_GG = logits_GG.masked_fill(same_GG, -math.inf)
    own_G = torch.arange(len(logits_GG), device=logits_GG.device)
    return 0.5 * (functional.cross_entropy(logits_GG, own_G) + functional.cross_entropy(logits_GG.T, own_G))


def with_others(accelerator: Accelerator, own_BD: Tensor) -> Tensor:
    """Return the global batch's rows [G, D]: the other processes' as constants, our own with their gradient.

    Every process computes the whole loss, so the gradients that reach the processes' own rows add up to the
    exact gradient: no collective needs a backward of its own.
    """
    if accelerator.num_processes == 1:
        return own_BD
    rows = list(accelerator.gather(own_BD.detach()).chunk(accelerator.num_processes))
    rows[accelerator.process_index] = own_BD
    return torch.cat(rows)


def clamp_temperature(model: CLIPModel) -> None:
    """Keep the learnt factor exp(logit_scale) in [1, 100]."""
    with torch.no_grad():
        model.logit_scale.clamp_(0.0, MAX_LOGIT_SCALE)


def _recipe(section: ClipConfig) -> Recipe:
    return Recipe(
        kind=KIND,
        batch=section.batch,
        steps=section.steps,
        warmup_steps=section.warmup_steps,
        learning_rate=section.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=0.1,
        clip_grad_norm=1.0,
        checkpoint_every=section.checkpoint_every,
        log_every=section.log_every,
    )


def _step_loss(stage: Stage, section: ClipConfig, table: PairTable, tokenizer: CLIPTokenizer) -> StepLoss:
    """Return step -> the loss over the global batch, with the gradient of this process's share."""
    accelerator = stage.accelerator
    processes, device = accelerator.num_processes, accelerator.device
    order = DistinctOrder(table.train, table.caption_ids, batch=section.batch, seed=stage.config.seed)

    def loss(network: nn.Module, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        places = order.batch(step)
        mine = places[share(places, accelerator.process_index, processes)]
        tokens_BL, _ = tokenize(tokenizer, [table.captions[place] for place in mine], section.max_tokens)
        images_BCHW = images_from_pixels(table.pixels(mine))
        image_BD, text_BD, scale = network(images_BCHW.to(device), tokens_BL.to(device))
        # The temperature is in every process's loss: a share of its gradient each, at its full value.
        shared_scale = scale.detach() + (scale - scale.detach()) / processes
        ids_G = torch.from_numpy(table.caption_ids[places]).to(device)
        total = contrastive_loss(
            with_others(accelerator, image_BD), with_others(accelerator, text_BD), shared_scale, ids_G
        )
        # Gradients are averaged over the processes; the factor makes it the sum that the loss is owed.
        return total * processes, {"loss": total, "logit_scale": scale}

    return loss


@torch.no_grad()
def measured_retrieval(
    model: CLIPModel, tokenizer: CLIPTokenizer, table: PairTable, places: np.ndarray
) -> dict[str, float] | None:
    """Return the recalls over the pairs at `places`, or None without pairs."""
    if not len(places):
        return None
    towers, device = ClipTowers(model), model.logit_scale.device
    length = model.text_model.embeddings.position_embedding.num_embeddings
    images, texts = [], []
    for first in range(0, len(places), MEASURE_BATCH):
        chosen = places[first : first + MEASURE_BATCH]
        tokens_BL, _ = tokenize(tokenizer, [table.captions[place] for place in chosen], length)
        image_BD, text_BD, _ = towers(
            images_from_pixels(table.pixels(chosen)).to(device), tokens_BL.to(device)
        )
        images.append(image_BD)
        texts.append(text_BD)
    return retrieval(torch.cat(images), torch.cat(texts), torch.from_numpy(table.caption_ids[places]))


def _publish(
    stage: Stage, model: CLIPModel, tokenizer: CLIPTokenizer, table: PairTable, noted: dict[str, float]
) -> None:
    """Measure the trained model and put both folders in place, each whole and each with the report."""
    report = {
        "kind": KIND,
        "settings": stage.settings,
        "steps": stage.recipe.steps,
        **noted,
        "vocabulary": len(tokenizer),
        "retrieval": {
            name: measured_retrieval(model, tokenizer, table, places[:RETRIEVAL_PAIRS])
            for name, places in (("train", table.train), ("validation", table.validation))
        },
        "tokenizer_digest": tokenizer_digest(tokenizer),
    }
    with whole_folder(stage.paths.clip) as clip_folder, whole_folder(stage.paths.text_encoder) as text_folder:
        save_clip(model, tokenizer, clip_folder, text_folder)
        report["text_encoder_digest"] = text_encoder_digest(text_folder)
        for folder in (clip_folder, text_folder):
            write_json(folder / REPORT, report)
