"""The text states of a step: read with the latents, or made by the frozen text encoder from the stored tokens.

Tokens cost 154 bytes a caption instead of 118 KB and a forward pass of the encoder in every step; the null text
of dropped captions comes from the same source as the rest, so guidance later starts where training did.
"""

import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline.config import RunConfig
from pipeline.data.loader import LatentBatch
from pipeline.diffusion.guidance import drop_captions
from pipeline.errors import DataError
from pipeline.latents.manifest import Manifest
from pipeline.latents.reader import LatentDataset
from pipeline.paths import RunPaths, text_encoder_folder

if TYPE_CHECKING:
    from pipeline.models.text_pair import TextEncoder


class TextSource(ABC):
    """Where the text states come from, with dropped captions already replaced by the null text."""

    def __init__(self, null_text_1LD: Tensor) -> None:
        """Keep the null text, float32 [1, L, D] on the device of the training."""
        self._null_text_1LD = null_text_1LD

    def states(self, batch: LatentBatch) -> Tensor:
        """Return the text states float32 [b, L, D] of a batch that lies on the device."""
        return drop_captions(self._captions(batch), self._null_text_1LD, batch.dropped)

    @abstractmethod
    def _captions(self, batch: LatentBatch) -> Tensor: ...

    def take_seconds(self) -> float | None:
        """Return the seconds spent in the text encoder since the last call, None without one; waits for the device."""
        return None


class StoredText(TextSource):
    """The embeddings of the data set."""

    def __init__(self, dataset: LatentDataset, device: torch.device) -> None:
        """Read the stored null text."""
        super().__init__(torch.from_numpy(dataset.null_text()["text"]).to(device, torch.float32))

    def _captions(self, batch: LatentBatch) -> Tensor:
        assert batch.text is not None
        return batch.text.float()


class EncodedText(TextSource):
    """The states that the frozen encoder makes of the stored tokens, without gradients."""

    def __init__(self, encoder: "TextEncoder", dataset: LatentDataset, device: torch.device) -> None:
        """Encode the stored tokens of the empty caption."""
        self._encoder, self._stopwatch = encoder, _Stopwatch(device)
        tokens_1L = torch.from_numpy(dataset.null_text()["tokens"].astype("int64"))
        super().__init__(encoder.encode(tokens_1L))

    def _captions(self, batch: LatentBatch) -> Tensor:
        with self._stopwatch:
            return self._encoder.encode(batch.tokens)

    def take_seconds(self) -> float:
        """Return the seconds spent in the text encoder since the last call; waits for the device."""
        return self._stopwatch.take_seconds()


def open_text(config: RunConfig, dataset: LatentDataset, paths: RunPaths, device: torch.device) -> TextSource:
    """Return the source of text states that the data set needs.

    Raises:
        ConfigError, DataError: the text encoder is missing, damaged, or not the one that made the data set.
    """
    if dataset.spec.text == "embeddings":
        return StoredText(dataset, device)
    from pipeline.models.text_pair import load_text_encoder

    folder = text_encoder_folder(config, paths)
    encoder = load_text_encoder(config.encode, folder, device)
    refuse_other_encoder(dataset.folder, dataset.manifest, folder, encoder)
    return EncodedText(encoder, dataset, device)


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
