"""Arithmetic and weights of the frozen encoders, in closed form: CLIP text towers and the KL autoencoder's encoder."""

import tomllib
from dataclasses import dataclass
from importlib.resources import files

from pipeline.config import RunConfig


@dataclass(frozen=True)
class TextTower:
    """A CLIP text transformer; `projection` is the width of its projected pooled text, 0 without one."""

    width: int
    layers: int
    vocabulary: int = 49408
    tokens: int = 77
    projection: int = 0

    @property
    def parameters(self) -> int:
        """Embeddings, per layer 12 width^2 + 13 width, the final norm, the projection."""
        layer = 12 * self.width**2 + 13 * self.width
        return (
            (self.vocabulary + self.tokens + 2) * self.width
            + self.layers * layer
            + self.projection * self.width
        )

    @property
    def flops(self) -> int:
        """FLOP of one caption, attention's matrix products included."""
        rows = 24 * self.width**2 * self.tokens + 4 * self.tokens**2 * self.width
        return self.layers * rows + 2 * self.projection * self.width


@dataclass(frozen=True)
class Encoder:
    """The encoder half of a KL autoencoder, as diffusers builds it, to the moments."""

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    latent_channels: int
    mid_block_attention: bool

    @property
    def downsampling(self) -> int:
        """Pixels of a side for one of the latent's."""
        return int(2 ** (len(self.block_out_channels) - 1))

    def flops(self, height: int, width: int) -> int:
        """FLOP of one picture."""
        positions = height * width
        total, before = 2 * positions * 9 * 3 * self.block_out_channels[0], self.block_out_channels[0]
        for level, channels in enumerate(self.block_out_channels):
            for _ in range(self.layers_per_block):
                total += _resnet_flops(before, channels, positions)
                before = channels
            if level < len(self.block_out_channels) - 1:
                positions //= 4
                total += 2 * positions * 9 * channels**2
        total += 2 * _resnet_flops(before, before, positions)
        if self.mid_block_attention:
            total += 2 * positions * 4 * before**2 + 4 * positions**2 * before
        moments = 2 * self.latent_channels
        return total + 2 * positions * (9 * before * moments + moments**2)


def _resnet_flops(before: int, channels: int, positions: int) -> int:
    around = before * channels if before != channels else 0
    return 2 * positions * (9 * before * channels + 9 * channels**2 + around)


def known() -> tuple[dict[str, TextTower], Encoder]:
    """Return the published text towers by name, and the f8 autoencoder's encoder that all of them go with."""
    table = tomllib.loads(files("pipeline.plan").joinpath("data/encoders.toml").read_text())
    towers = {name: TextTower(**tower) for name, tower in table["text"].items()}
    encoder = table["autoencoder"]
    return towers, Encoder(tuple(encoder.pop("block_out_channels")), **encoder)


def encoders_of(config: RunConfig) -> tuple[tuple[TextTower, ...], Encoder]:
    """Return the run's own encoders if it trains them, else the published ones that fit its text width.

    No tower where none fits: a text encoder of another family is not priced.
    """
    towers, encoder = known()
    if config.first_stage is None:
        width = config.model.cross_attention_dim
        fitting = {768: ("clip_l",), 1024: ("openclip_h",), 2048: ("clip_l", "openclip_big_g")}.get(width, ())
        return tuple(towers[name] for name in fitting), encoder
    clip, own = config.first_stage.clip, config.first_stage.autoencoder
    tower = TextTower(clip.width, clip.text_layers, clip.vocabulary, clip.max_tokens)
    return (tower,), Encoder(
        own.block_out_channels, own.layers_per_block, own.latent_channels, own.mid_block_attention
    )
