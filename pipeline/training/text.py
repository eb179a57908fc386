"""The text of a step, read with the latents or made by the frozen text encoder from the stored tokens; SDXL's sizes.

Tokens cost 154 bytes a caption instead of 118 KB and a forward pass of the encoder in every step; the null text
of dropped captions comes from the same source as the rest, so guidance later starts where training did. It is the
encoder's own empty caption for SDXL too, states and pooled text, where the published weights saw zeros: one rule for
all models, and an exported pipeline says so (`force_zeros_for_empty_prompt: false`).
"""

import time
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline.config import RunConfig
from pipeline.data.conditions import require_sizes
from pipeline.data.loader import LatentBatch
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.guidance import drop_captions
from pipeline.errors import DataError
from pipeline.latents.manifest import Manifest
from pipeline.latents.reader import LatentDataset
from pipeline.paths import RunPaths, text_encoder_folder

if TYPE_CHECKING:
    from pipeline.models.text_pair import TextEncoder


class TextSource(ABC):
    """Where the text comes from, with dropped captions already replaced by the null text."""

    def __init__(self, null_text: Conditioning) -> None:
        """Keep the null text of one sample, float32 on the device of the training; pooled for SDXL alone."""
        self._null_text = null_text

    def conditions(self, batch: LatentBatch) -> Conditioning:
        """Return the conditions, float32, of a batch that lies on the device.

        Raises:
            DataError: the network takes sizes and the data set does not record them.
        """
        conditions = drop_captions(self._captions(batch), self._null_text, batch.dropped)
        if conditions.pooled_BP is None:
            return conditions
        return replace(conditions, time_ids_BS=require_sizes(batch.time_ids))

    @abstractmethod
    def _captions(self, batch: LatentBatch) -> Conditioning: ...

    def take_seconds(self) -> float | None:
        """Return the seconds spent in the text encoder since the last call, None without one; waits for the device."""
        return None


class StoredText(TextSource):
    """The embeddings of the data set."""

    def __init__(self, dataset: LatentDataset, device: torch.device, *, pooled: bool) -> None:
        """Read the stored null text, with its pooled part where the network takes one."""
        stored = dataset.null_text()
        names = ("text", "pooled") if pooled else ("text",)
        null = (torch.from_numpy(stored[name]).to(device, torch.float32) for name in names)
        super().__init__(Conditioning(*null))
        self._pooled = pooled

    def _captions(self, batch: LatentBatch) -> Conditioning:
        assert batch.text is not None
        if not self._pooled:
            return Conditioning(batch.text.float())
        assert batch.pooled is not None
        return Conditioning(batch.text.float(), batch.pooled.float())


class EncodedText(TextSource):
    """What the frozen encoder makes of the stored tokens, without gradients."""

    def __init__(
        self, encoder: "TextEncoder", dataset: LatentDataset, device: torch.device, *, pooled: bool
    ) -> None:
        """Encode the stored tokens of the empty caption, with its pooled part where the network takes one."""
        self._encoder, self._stopwatch, self._pooled = encoder, _Stopwatch(device), pooled
        super().__init__(self._encoded(torch.from_numpy(dataset.null_text()["tokens"].astype("int64"))))

    def _captions(self, batch: LatentBatch) -> Conditioning:
        with self._stopwatch:
            return self._encoded(batch.tokens)

    def _encoded(self, tokens_BL: Tensor) -> Conditioning:
        text_BLD, pooled_BP = self._encoder.encode_pooled(tokens_BL)
        return Conditioning(text_BLD, pooled_BP if self._pooled else None)

    def take_seconds(self) -> float:
        """Return the seconds spent in the text encoder since the last call; waits for the device."""
        return self._stopwatch.take_seconds()


def open_text(config: RunConfig, dataset: LatentDataset, paths: RunPaths, device: torch.device) -> TextSource:
    """Return the source of text that the data set needs.

    Raises:
        ConfigError, DataError: the text encoder is missing, damaged, or not the one that made the data set.
    """
    pooled = config.model.addition_embed_type is not None
    if dataset.spec.text == "embeddings":
        return StoredText(dataset, device, pooled=pooled)
    from pipeline.models.text_pair import load_text_encoder

    folder = text_encoder_folder(config, paths)
    encoder = load_text_encoder(config.encode, folder, device)
    refuse_other_encoder(dataset.folder, dataset.manifest, folder, encoder)
    return EncodedText(encoder, dataset, device, pooled=pooled)


def refuse_other_encoder(dataset: Path, manifest: Manifest, folder: Path, encoder: "TextEncoder") -> None:
    """Do nothing if `encoder`, loaded from `folder`, is the one that the data set was made with.

    Raises:
        DataError: naming the field and both digests.
    """
    found = {"text_encoder": encoder.digest, "tokenizer": encoder.tokenizer_digest}
    differing = [
        f"encoder.{name} of the data set is {manifest.encoder[name][:16]}, of {folder} it is {digest[:16]}"
        for name, digest in found.items()
        if manifest.encoder[name] != digest
    ]
    if differing:
        raise DataError(
            f"{dataset}: {'; '.join(differing)}; its tokens mean something else there: give the folder it was "
            "encoded with as encode.text_encoder, or encode again"
        )


class _Stopwatch:
    """Adds up the time of a block: on a GPU by events, so that no step waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[Any, Any]] = []
        self._began: Any = None

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self) -> None:
        self._began = self._now()

    def __exit__(self, *_: object) -> None:
        self._marks.append((self._began, self._now()))

    def take_seconds(self) -> float:
        marks, self._marks = self._marks, []
        if not self._on_gpu:
            return sum(end - began for began, end in marks)
        if marks:
            marks[-1][1].synchronize()
        return sum(began.elapsed_time(end) for began, end in marks) / 1000.0
