"""Captions to tokens and text states with a frozen text model; and a small CLIP built from scratch.

What is written here carries the tensor names with the prefix `text_model.`, which every version of transformers
reads. Shape letters: B batch, L tokens, D width, P width of projected text.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, trainers
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from pipeline.config import ClipConfig
from pipeline.errors import ConfigError
from pipeline.models.model_folder import model_digest, open_model_folder
from pipeline.models.text_models import (
    CLIP_TYPES,
    DTYPES,
    PREFIX,
    PROJECTION,
    REMEDY,
    WEIGHTS_STEM,
    Precision,
    TextParts,
    Tokens,
    Word,
    clip_tokens,
    load_text_parts,
    quiet_transformers,
    text_model_type,
    tower_name,
)
from pipeline.publish import json_digest, write_json

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
Layer = Literal["last", "penultimate"]


class FrozenTextEncoder:
    """A text model and its tokenizer that only map: no gradients, no dropout."""

    pooled_width: int | None = None
    """A single encoder stores no pooled text; SDXL's pair does (`text_pair`)."""

    def __init__(
        self, parts: TextParts, digest: str, layer: Layer = "last", max_tokens: int | None = None
    ) -> None:
        """Freeze the model; `digest` names its stored config and weights."""
        self._model = parts.model.eval().requires_grad_(False)
        self._projection, self._words = parts.projection, Tokens.of(parts, max_tokens)
        self._layer, self._masked, self._folder = layer, not parts.is_clip, parts.folder
        self._fp32: Self | None = None
        self.digest = digest if layer == "last" else json_digest([digest, layer])
        self.tokenizer_digest = tokenizer_digest(parts.tokenizer)
        self.vocabulary_digest = tokenizer_digest(parts.tokenizer, special=False)
        self.max_tokens = self._words.length
        self.width = int(parts.model.config.hidden_size)
        self.end_token_id, self.pad_token_id = self._words.end, self._words.pad
        self.projected_width = None if parts.projection is None else int(parts.projection.shape[0])

    @classmethod
    def load(
        cls,
        folder: Path | str,
        device: str | torch.device = "cpu",
        precision: Precision = "fp32",
        *,
        layer: Layer = "last",
        max_tokens: int | None = None,
    ) -> Self:
        """Return the text encoder in a local folder, weights in `precision`, on `device`.

        The folder is that of a CLIP text model (with or without projection), of a whole CLIP, or of any other
        text model that transformers knows (T5, BERT, ...); the tokenizer lies in it or, as in a diffusers
        pipeline, in the folder `tokenizer` beside it (`tokenizer_2` for `text_encoder_2`). `max_tokens` is for
        models without a length of their own.

        Raises:
            ConfigError: when a folder is missing or holds another kind of model.
            DataError: when it holds code, is damaged, lacks weights, or the tokenizer is another model's.
        """
        folder = Path(folder)
        digest = text_encoder_digest(folder)
        parts = load_text_parts(folder, DTYPES[precision], torch.device(device))
        return cls(parts, digest, layer, max_tokens)

    def in_fp32(self) -> Self:
        """Return the same encoder in fp32 on the same device, loaded from its folder at the first call."""
        if self._model.dtype == torch.float32:
            return self
        if self._fp32 is None:
            self._fp32 = self.load(
                self._folder, self._model.device, "fp32", layer=self._layer, max_tokens=self.max_tokens
            )
        return self._fp32

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return tokens int64 [B, L] and whether each caption was cut, bool [B].

        A row is start (where the model has one), the caption's tokens, end, then padding; a long caption is cut
        before the end token.
        """
        return self._words.rows(captions)

    def words(self, caption: str) -> list[Word]:
        """Return the caption's words in order, with the places of their tokens in its row of `tokenize`."""
        return self._words.words(caption)

    def encode(self, tokens_BL: Tensor) -> Tensor:
        """Return text states [B, L, D], fp32: of the last layer after the final norm, or of the one before.

        CLIP gets no padding mask, because the U-Net attends to padding too; other models get theirs.
        """
        return self.encode_projected(tokens_BL)[0]

    @torch.no_grad()
    def encode_projected(self, tokens_BL: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the states and, where the folder has a projection, the projected end state [B, P], fp32."""
        tokens = tokens_BL.to(self._model.device)
        mask = {"attention_mask": (tokens != self.pad_token_id).long()} if self._masked else {}
        penultimate = self._layer == "penultimate"
        output = self._model(input_ids=tokens, output_hidden_states=penultimate, **mask)
        text_BLD: Tensor = output.hidden_states[-2] if penultimate else output.last_hidden_state
        if self._projection is None:
            return text_BLD.float(), None
        return text_BLD.float(), nn.functional.linear(output.pooler_output, self._projection).float()

    def encode_pooled(self, tokens_BL: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the states and None: see `pooled_width`."""
        return self.encode(tokens_BL), None


def text_encoder_digest(folder: Path, *, projected: bool = False) -> str:
    """Return the sha256 over config and weights of the text model in `folder`, a whole CLIP's or its own.

    `projected` counts the projection of the end state too, where it is used.

    Raises:
        ConfigError: when the folder is missing or holds another kind of model.
        DataError: when it holds code or is damaged.
    """
    found = open_model_folder(folder, WEIGHTS_STEM, REMEDY)
    kind = text_model_type(found)
    if kind not in CLIP_TYPES:
        return model_digest(found, found.config)
    config = found.config.get("text_config") or {} if kind == "clip" else found.config
    rename = (lambda name: name if name == PROJECTION else tower_name(name)) if projected else tower_name
    return model_digest(found, config, rename)


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
    """Return tokens int64 [B, max_tokens] and whether each caption was cut, bool [B], as `FrozenTextEncoder` does."""
    return clip_tokens(tokenizer, captions, max_tokens)


def tokenizer_digest(tokenizer: Any, *, special: bool = True) -> str:
    """Return the sha256 over what decides the tokens: vocabulary, merges and the special entries.

    Without `special` the padding and the other special entries do not count: equal means interchangeable ids.
    """
    state = _model_state(tokenizer.backend_tokenizer)
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id] if special else []
    if "merges" not in state:  # not byte pairs (T5, BERT): everything the tokenizer is made of
        return json_digest({"tokenizer": json.loads(tokenizer.backend_tokenizer.to_str()), "special": ends})
    merges = [list(pair) for pair in state["merges"]]
    return json_digest({"vocabulary": state["vocab"], "merges": merges, "special": ends})


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
    with quiet_transformers():
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
