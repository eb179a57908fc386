"""Text models and tokenizers from local transformers folders, complete or refused.

CLIP checkpoints name the text tower's tensors with or without the prefix `text_model.` (transformers >= 5.6 dropped
the attribute); both load. Shape letters: B batch, L tokens, D width, P width of projected text.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForTextEncoding, AutoTokenizer, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from pipeline.errors import ConfigError, DataError
from pipeline.models.model_folder import ModelFolder, open_model_folder, refuse_code

WEIGHTS_STEM = "model"
PREFIX = "text_model."
PROJECTION = "text_projection.weight"
CLIP_TYPES = ("clip_text_model", "clip")
REMEDY = (
    "set encode.text_encoder to a local transformers text folder, or make one with `ldm train-clip CONFIG`"
)
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model", "vocab.txt")
LONGEST = 1_000_000
"""Tokenizers without a length of their own say something astronomic."""
Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TextParts:
    """A loaded text model with its tokenizer; `projection` [P, D] maps CLIP's end state, where the folder has one."""

    folder: Path
    model: Any
    tokenizer: Any
    projection: Tensor | None
    is_clip: bool


@dataclass(frozen=True)
class Word:
    """A word of a caption, as spaces part them, and which of the row's tokens it has become; none if it was cut."""

    text: str
    positions: list[int]


@dataclass(frozen=True)
class Tokens:
    """How captions become rows of equal length."""

    tokenizer: Any
    length: int
    end: int
    pad: int
    is_clip: bool

    @classmethod
    def of(cls, parts: TextParts, max_tokens: int | None) -> Self:
        """Return the rows of a model: CLIP's own length, or the tokenizer's, at most `max_tokens`.

        Raises:
            ConfigError: when nobody says how long a row is, or `max_tokens` is not what the model was made for.
        """
        own = int(getattr(parts.model.config, "max_position_embeddings", 0) or 0) if parts.is_clip else 0
        own = own or int(min(parts.tokenizer.model_max_length, LONGEST))
        if own == LONGEST and max_tokens is None:
            raise ConfigError(
                f"{parts.folder}: the model reads captions of any length; set encode.max_tokens (T5 of PixArt: 120)"
            )
        length = min(own, max_tokens or own)
        if parts.is_clip and length != own:
            raise ConfigError(
                f"encode.max_tokens: {max_tokens}, but CLIP in {parts.folder} was made for {own}: set it to null"
            )
        special = parts.tokenizer
        end = special.eos_token_id if special.eos_token_id is not None else special.sep_token_id
        return cls(parts.tokenizer, length, end, special.pad_token_id, parts.is_clip)

    def rows(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return tokens int64 [B, L] and whether each caption was cut, bool [B]."""
        if self.is_clip:
            return clip_tokens(self.tokenizer, captions, self.length)
        if not captions:
            return torch.zeros(0, self.length, dtype=torch.int64), torch.zeros(0, dtype=torch.bool)
        uncut = self.tokenizer(list(captions), verbose=False)["input_ids"]
        rows = self.tokenizer(list(captions), padding="max_length", truncation=True, max_length=self.length)
        return torch.tensor(rows["input_ids"]), torch.tensor([len(row) > self.length for row in uncut])

    def words(self, caption: str) -> list[Word]:
        """Return the caption's words in order, with the places of their tokens in its row."""
        found = [
            (match.start(), match.end(), Word(match.group(), [])) for match in re.finditer(r"\S+", caption)
        ]
        # As `rows` does it: CLIP's start and end are put around; other tokenizers put their own, of no length.
        room, first = (self.length - 2, 1) if self.is_clip else (self.length, 0)
        tokens = self.tokenizer(
            caption,
            add_special_tokens=not self.is_clip,
            truncation=True,
            max_length=room,
            return_offsets_mapping=True,
        )
        for place, (start, end) in enumerate(tokens["offset_mapping"], first):
            for begin, finish, word in found:
                if start < finish and end > begin:
                    word.positions.append(place)
        return [word for _, _, word in found]


def clip_tokens(tokenizer: CLIPTokenizer, captions: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
    """Return tokens int64 [B, max_tokens] and whether each caption was cut, bool [B].

    A row is start, the caption's tokens, end, then padding; a long caption is cut before the end token.
    """
    room = max_tokens - 2
    rows = tokenizer(list(captions), add_special_tokens=False, verbose=False)["input_ids"] if captions else []
    tokens_BL = torch.full((len(rows), max_tokens), tokenizer.pad_token_id, dtype=torch.int64)
    for place, row in enumerate(rows):
        row = [tokenizer.bos_token_id, *row[:room], tokenizer.eos_token_id]
        tokens_BL[place, : len(row)] = torch.tensor(row)
    return tokens_BL, torch.tensor([len(row) > room for row in rows], dtype=torch.bool)


def load_text_parts(folder: Path, dtype: torch.dtype, device: torch.device) -> TextParts:
    """Return model and tokenizer of a local folder, the model in `dtype` on `device`.

    Raises:
        ConfigError: when a folder is missing or holds another kind of model.
        DataError: when it holds code, is damaged, lacks weights, or the tokenizer is another model's.
    """
    found = open_model_folder(folder, WEIGHTS_STEM, REMEDY)
    is_clip = text_model_type(found) in CLIP_TYPES
    model = _load_complete(folder, CLIPTextModel if is_clip else AutoModelForTextEncoding, dtype)
    tokenizer = _load_tokenizer(folder, CLIPTokenizer if is_clip else AutoTokenizer)
    _require_fit(folder, model, tokenizer, is_clip)
    nn.Module.to(model, device)
    projection = _projection(found) if is_clip else None
    return TextParts(
        folder, model, tokenizer, None if projection is None else projection.to(device, dtype), is_clip
    )


def text_model_type(found: ModelFolder) -> str:
    """Return the folder's `model_type`.

    Raises:
        ConfigError: when it is not one that encodes text.
    """
    kind = str(found.config.get("model_type"))
    known = {config.model_type for config in AutoModelForTextEncoding._model_mapping}
    if kind not in known and kind not in CLIP_TYPES:
        raise ConfigError(
            f"{found.folder}: model_type is {kind!r}, which is no text encoder (CLIP, T5, BERT, ...); {REMEDY}"
        )
    return kind


def tower_name(name: str) -> str | None:
    """Return a stored tensor's name inside the text tower, or None for tensors of the rest of a CLIP."""
    bare = name.removeprefix(PREFIX)
    used = bare.startswith(("embeddings.", "encoder.", "final_layer_norm.")) and "position_ids" not in bare
    return bare if used else None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the library's bars and load reports: what matters in them is checked and said by us."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _load_complete(folder: Path, kind: Any, dtype: torch.dtype) -> Any:
    """Return the model with every weight from the file: the library fills gaps with random numbers."""
    try:
        with quiet_transformers():
            loaded: Any = kind.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                dtype=dtype,
            )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise DataError(f"{folder}: not a readable text encoder ({str(error).splitlines()[0]})") from error
    model, loading = loaded
    is_clip = kind is CLIPTextModel
    unused = {name for name in loading["unexpected_keys"] if is_clip and tower_name(name)}
    # BERT's pooler is no part of the states, and checkpoints of other heads lack it.
    missing = {name for name in loading["missing_keys"] if is_clip or not name.startswith("pooler.")}
    wrong = sorted({*missing, *unused, *(str(key) for key in loading["mismatched_keys"])})
    if wrong:
        raise DataError(
            f"{folder}: weights and config.json do not fit together, first at {wrong[0]}; fetch them again"
        )
    return model


def _projection(found: ModelFolder) -> Tensor | None:
    """Return the projection of the end state [P, D] in a CLIP folder, if there is one."""
    for path in found.weights:
        with safe_open(path, framework="pt") as stream:
            if PROJECTION in stream.keys():
                tensor: Tensor = stream.get_tensor(PROJECTION).clone()
                return tensor
    return None


def _load_tokenizer(folder: Path, kind: Any) -> Any:
    """Return the tokenizer in `folder` or in the pipeline's tokenizer folder beside it."""
    beside = (
        folder.name.replace("text_encoder", "tokenizer") if "text_encoder" in folder.name else "tokenizer"
    )
    for place in (folder, folder.parent / beside):
        if any((place / name).is_file() for name in TOKENIZER_FILES):
            refuse_code(place)
            break
    else:
        raise ConfigError(f"{folder}: no tokenizer.json or vocab.json, nor in {beside}/ beside it; {REMEDY}")
    try:
        with quiet_transformers():
            return kind.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the Rust side raises bare Exception
        raise DataError(f"{place}: not a readable tokenizer ({str(error).splitlines()[0]})") from error


def _require_fit(folder: Path, model: Any, tokenizer: Any, is_clip: bool) -> None:
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    needed = special if is_clip else special[2:]
    entries = model.config.vocab_size
    if None in needed or len(tokenizer) > entries:
        raise DataError(
            f"{folder}: the tokenizer has {len(tokenizer)} entries with start, end, padding {special}, the model "
            f"{entries}; they belong to different models"
        )
