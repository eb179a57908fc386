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
from torch import Tensor, nn

from pipeline.config import ClipConfig, RunConfig
from pipeline.errors import ConfigError
from pipeline.first_stage.contrastive import gathered_loss
from pipeline.first_stage.loop import train_once
from pipeline.first_stage.measure import MEASURE_BATCH, retrieval
from pipeline.first_stage.pairs import DistinctOrder, PairTable, PreparedPair, read_pairs, share
from pipeline.first_stage.stage import Learner, Parts, Recipe, Stage, open_stage
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
    stage = open_stage(
        config,
        paths,
        Recipe.paced(KIND, section, betas=(0.9, 0.98), weight_decay=0.1, clip_grad_norm=1.0),
        {
            **section.model_dump(mode="json", exclude={"checkpoint_every", "log_every"}),
            "pairs": table.digest,
            "tokenizer": tokenizer_digest(tokenizer),
        },
    )
    train_once(
        stage,
        [paths.clip, paths.text_encoder],
        REPORT,
        lambda: ClipTrainee(stage, section, table, tokenizer),
        lambda trained, noted: _publish(stage, trained.model.eval(), tokenizer, table, noted),
    )
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


def clamp_temperature(model: CLIPModel) -> None:
    """Keep the learnt factor exp(logit_scale) in [1, 100]."""
    with torch.no_grad():
        model.logit_scale.clamp_(0.0, MAX_LOGIT_SCALE)


class ClipTrainee:
    """A CLIP under AdamW: the loss over the global batch, with the gradient of this process's share."""

    def __init__(self, stage: Stage, section: ClipConfig, table: PairTable, tokenizer: CLIPTokenizer) -> None:
        """Draw the towers from torch's generator."""
        self._stage, self._section, self._table, self._tokenizer = stage, section, table, tokenizer
        self.model = build_clip(section, stage.config.encode.image_size, tokenizer)
        self._learner = Learner(stage, ClipTowers(self.model))
        seed = stage.config.seed
        self._order = DistinctOrder(table.train, table.caption_ids, batch=section.batch, seed=seed)

    def step(self, step: int, *, measured: bool) -> dict[str, Tensor]:
        """Take step `step`; there is nothing more to measure at a record."""
        accelerator, table = self._stage.accelerator, self._table
        places = self._order.batch(step)
        mine = places[share(places, accelerator.process_index, accelerator.num_processes)]
        captions = [table.captions[place] for place in mine]
        tokens_BL, _ = tokenize(self._tokenizer, captions, self._section.max_tokens)
        images_BCHW = images_from_pixels(table.pixels(mine))
        device = accelerator.device
        image_BD, text_BD, scale = self._learner.wrapped(images_BCHW.to(device), tokens_BL.to(device))
        ids_G = torch.from_numpy(table.caption_ids[places]).to(device)
        loss = gathered_loss(accelerator, image_BD, text_BD, scale, ids_G)
        grad_norm = self._learner.learn(loss * accelerator.num_processes, step)
        clamp_temperature(self.model)
        return {"loss": loss.detach(), "logit_scale": scale.detach(), "grad_norm": grad_norm}

    def parts(self) -> Parts:
        """Return weights and AdamW state."""
        return self._learner.parts()

    def restore(self, parts: Parts) -> None:
        """Lay them in."""
        self._learner.restore(parts)

    def picture(self) -> None:
        """Return nothing: there is nothing to look at."""

    def collapse(self, shown: dict[str, float]) -> str | None:
        """Return None: a contrastive loss that learns nothing stays at ln(batch), which its record says."""
        return None


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
