"""CLIP: captions to tokens and text states, from a local transformers folder; and a small CLIP built from scratch.

Checkpoints name the text tower's tensors with or without the prefix `text_model.` (transformers >= 5.6 dropped
the attribute); both load, and what is written here carries the prefix, which every version reads. Shape letters:
B batch, L tokens, D width.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, trainers
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from pipeline.config import ClipConfig
from pipeline.errors import ConfigError, DataError
from pipeline.models.model_folder import model_digest, open_model_folder, refuse_code
from pipeline.publish import json_digest, write_json

WEIGHTS_STEM = "model"
PREFIX = "text_model."
START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
REMEDY = "set encode.text_encoder to a local transformers CLIP text folder, or make one with `ldm train-clip CONFIG`"
Precision = Literal["fp32", "bf16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


class FrozenTextEncoder:
    """A CLIP text tower and its tokenizer that only map: no gradients, no dropout."""

    def __init__(self, model: CLIPTextModel, tokenizer: CLIPTokenizer, digest: str) -> None:
        """Freeze `model`; `digest` names its stored config and weights."""
        self._model = model.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self.digest = digest
        self.tokenizer_digest = tokenizer_digest(tokenizer)
        self.max_tokens = int(model.config.max_position_embeddings)
        self.width = int(model.config.hidden_size)
        self.pooled_width: int | None = None

    @classmethod
    def load(
        cls, folder: Path | str, device: str | torch.device = "cpu", precision: Precision = "fp32"
    ) -> Self:
        """Return the text encoder in a local folder, weights in `precision`, on `device`.

        The folder is that of a CLIPTextModel or of a whole CLIPModel; the tokenizer lies in it or, as in a
        diffusers pipeline, in the folder `tokenizer` beside it.

        Raises:
            ConfigError: when a folder is missing or holds another kind of model.
            DataError: when it holds code, is damaged, lacks weights, or the tokenizer is another model's.
        """
        folder = Path(folder)
        digest = text_encoder_digest(folder)
        model = _load_complete(folder, DTYPES[precision])
        tokenizer = _load_tokenizer(folder)
        _require_fit(folder, model, tokenizer)
        nn.Module.to(model, torch.device(device))
        return cls(model, tokenizer, digest)

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return tokens int64 [B, L] and whether each caption was cut, bool [B].

        A row is start, the caption's tokens, end, then padding; a long caption is cut before the end token.
        """
        tokenizer, room = self._tokenizer, self.max_tokens - 2
        rows = (
            tokenizer(list(captions), add_special_tokens=False, verbose=False)["input_ids"]
            if captions
            else []
        )
        tokens_BL = torch.full((len(rows), self.max_tokens), tokenizer.pad_token_id, dtype=torch.int64)
        for place, row in enumerate(rows):
            row = [tokenizer.bos_token_id, *row[:room], tokenizer.eos_token_id]
            tokens_BL[place, : len(row)] = torch.tensor(row)
        return tokens_BL, torch.tensor([len(row) > room for row in rows], dtype=torch.bool)

    @torch.no_grad()
    def encode(self, tokens_BL: Tensor) -> Tensor:
        """Return text states [B, L, D], fp32: the last layer after the final norm, as SD 1.x conditions on.

        No padding mask is given, because the U-Net attends to padding too.
        """
        text_BLD: Tensor = self._model(input_ids=tokens_BL.to(self._model.device)).last_hidden_state
        return text_BLD.float()


def text_encoder_digest(folder: Path) -> str:
    """Return the sha256 over config and weights of the text tower in `folder`, a text model's or a whole CLIP's.

    Raises:
        ConfigError: when the folder is missing or holds another kind of model.
        DataError: when it holds code or is damaged.
    """
    found = open_model_folder(folder, WEIGHTS_STEM, REMEDY)
    kind = found.config.get("model_type")
    if kind not in ("clip_text_model", "clip"):
        raise ConfigError(
            f"{folder}: model_type is {kind!r}; only CLIP text encoders are supported; {REMEDY}"
        )
    config = found.config.get("text_config") or {} if kind == "clip" else found.config
    return model_digest(found, config, _tower_name)


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
    """Return tokens int64 [B, max_tokens] and whether each caption was cut, bool [B], as `FrozenTextEncoder` does."""
    room = max_tokens - 2
    rows = tokenizer(list(captions), add_special_tokens=False, verbose=False)["input_ids"] if captions else []
    tokens_BL = torch.full((len(rows), max_tokens), tokenizer.pad_token_id, dtype=torch.int64)
    for place, row in enumerate(rows):
        row = [tokenizer.bos_token_id, *row[:room], tokenizer.eos_token_id]
        tokens_BL[place, : len(row)] = torch.tensor(row)
    return tokens_BL, torch.tensor([len(row) > room for row in rows], dtype=torch.bool)


def tokenizer_digest(tokenizer: CLIPTokenizer) -> str:
    """Return the sha256 over what decides the tokens: vocabulary, merges and the special entries."""
    state = _model_state(tokenizer.backend_tokenizer)
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    merges = [list(pair) for pair in state["merges"]]
    return json_digest({"vocabulary": state["vocab"], "merges": merges, "special": special})


def train_tokenizer(captions: Sequence[str], vocabulary: int, max_tokens: int) -> CLIPTokenizer:
    """Return a byte-pair tokenizer of at most `vocabulary` entries, laid out as CLIP's.

    The layout is 256 byte symbols, the same ending a word, one entry a merge, start, end; padding is the end
    token. Equal captions, in any order, give equal merges: the library breaks ties by entry number and numbers
    symbols in the order of a randomly seeded table, so they are numbered beforehand.

    Raises:
        ConfigError: when `vocabulary` has no room for the bytes, or `max_tokens` none for start and end.
    """
    clip_like = CLIPTokenizer()
    symbols = _byte_symbols()
    smallest = 2 * len(symbols) + 2
    if vocabulary < smallest or max_tokens < 3:
        raise ConfigError(
            f"first_stage.clip: vocabulary {vocabulary} and max_tokens {max_tokens}; at least {smallest} "
            f"(bytes, word endings, start and end) and 3 are needed"
        )
    bpe = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    bpe.normalizer = clip_like.backend_tokenizer.normalizer
    bpe.pre_tokenizer = clip_like.backend_tokenizer.pre_tokenizer
    endings = [symbol + WORD_END for symbol in symbols]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 2,
        min_frequency=2,
        show_progress=False,
        special_tokens=[*symbols, *endings],
        end_of_word_suffix=WORD_END,
    )
    bpe.train_from_iterator(sorted(captions), trainer)
    merges: Any = [tuple(pair) for pair in _model_state(bpe)["merges"]]
    names = dict.fromkeys([*symbols, *endings, *(left + right for left, right in merges), START, END])
    return CLIPTokenizer(
        vocab={name: place for place, name in enumerate(names)}, merges=merges, model_max_length=max_tokens
    )


def build_clip(config: ClipConfig, image_size: int, tokenizer: CLIPTokenizer) -> CLIPModel:
    """Return a fresh CLIPModel for square images of `image_size` pixels, drawn from torch's generator.

    Both towers and the shared space have `config.width`, so the states that the U-Net attends to are as wide as
    the space that the loss shapes.

    Raises:
        ConfigError: when the patches do not tile the image.
    """
    if image_size % config.patch:
        raise ConfigError(
            f"first_stage.clip.patch {config.patch} does not divide encode.image_size {image_size}: give a divisor"
        )
    tower = {
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "num_attention_heads": config.heads,
        "projection_dim": config.width,
    }
    text = {
        **tower,
        "num_hidden_layers": config.text_layers,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": config.max_tokens,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "architectures": ["CLIPTextModel"],
    }
    vision = {
        **tower,
        "num_hidden_layers": config.vision_layers,
        "image_size": image_size,
        "patch_size": config.patch,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=config.width))


def save_clip(
    model: CLIPModel, tokenizer: CLIPTokenizer, clip_folder: Path, text_encoder_folder: Path
) -> None:
    """Write the whole CLIP, and its text tower alone; each with the tokenizer.

    Written in place: call it inside `publish.whole_folder`.
    """
    with _quiet_transformers():
        model.save_pretrained(clip_folder, safe_serialization=True)
    vision: Any = model.config.vision_config
    text: Any = model.config.text_config
    write_json(clip_folder / "preprocessor_config.json", _image_processor(vision.image_size))
    text_encoder_folder.mkdir(parents=True, exist_ok=True)
    text.save_pretrained(text_encoder_folder)
    tensors = {PREFIX + name: tensor.contiguous() for name, tensor in model.text_model.state_dict().items()}
    save_file(tensors, text_encoder_folder / f"{WEIGHTS_STEM}.safetensors", metadata={"format": "pt"})
    for folder in (clip_folder, text_encoder_folder):
        _save_tokenizer(tokenizer, folder)


def _save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write today's `tokenizer.json` and the two files that older readers want."""
    tokenizer.save_pretrained(folder)
    state = _model_state(tokenizer.backend_tokenizer)
    write_json(folder / "vocab.json", state["vocab"])
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in state["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _image_processor(image_size: int) -> dict[str, Any]:
    """Return transformers' description of our images: resized squares, values in [-1, 1]."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": image_size},
        "crop_size": {"height": image_size, "width": image_size},
        "do_resize": True,
        "do_center_crop": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
    }


def _byte_symbols() -> list[str]:
    """Return the printable stand-in of each of the 256 bytes, in CLIP's order: the printable bytes come first."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + place) for place in range(others)]


def _model_state(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the vocabulary and merges of a byte-pair tokenizer as plain data."""
    return dict(json.loads(tokenizer.to_str())["model"])


def _tower_name(name: str) -> str | None:
    """Return a stored tensor's name inside the text tower, or None for tensors of the rest of a CLIP."""
    bare = name.removeprefix(PREFIX)
    used = bare.startswith(("embeddings.", "encoder.", "final_layer_norm.")) and "position_ids" not in bare
    return bare if used else None


@contextmanager
def _quiet_transformers() -> Iterator[None]:
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


def _load_complete(folder: Path, dtype: torch.dtype) -> CLIPTextModel:
    """Return the tower with every weight from the file: the library fills gaps with random numbers."""
    try:
        with _quiet_transformers():
            loaded: Any = CLIPTextModel.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                dtype=dtype,
            )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise DataError(
            f"{folder}: not a readable CLIP text encoder ({str(error).splitlines()[0]})"
        ) from error
    model, loading = loaded
    unused = {name for name in loading["unexpected_keys"] if _tower_name(name)}
    wrong = sorted({*loading["missing_keys"], *unused, *(str(key) for key in loading["mismatched_keys"])})
    if wrong:
        raise DataError(
            f"{folder}: weights and config.json do not fit together, first at {wrong[0]}; fetch them again"
        )
    return model


def _load_tokenizer(folder: Path) -> CLIPTokenizer:
    """Return the tokenizer in `folder` or in `tokenizer` beside it."""
    for place in (folder, folder.parent / "tokenizer"):
        if (place / "tokenizer.json").is_file() or (place / "vocab.json").is_file():
            refuse_code(place)
            break
    else:
        raise ConfigError(f"{folder}: no tokenizer.json or vocab.json, nor in tokenizer/ beside it; {REMEDY}")
    try:
        with _quiet_transformers():
            return CLIPTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the Rust side raises bare Exception
        raise DataError(f"{place}: not a readable CLIP tokenizer ({str(error).splitlines()[0]})") from error


def _require_fit(folder: Path, model: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    entries = model.config.vocab_size
    if None in special or len(tokenizer) > entries:
        raise DataError(
            f"{folder}: the tokenizer has {len(tokenizer)} entries with start, end, padding {special}, the model "
            f"{entries}; they belong to different models"
        )
