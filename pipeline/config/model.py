"""The shape of the cross-attention U-Net."""

from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.config.base import Fraction, Positive, Section

Depth = Positive | tuple[Positive, ...]
"""Transformer blocks behind each residual block of a level: one number for all of them, or one for each."""


class UNetConfig(Section):
    """The cross-attention U-Net, in diffusers' own field names and with its defaults for SD 1.x."""

    sample_size: Positive = Field(64, description="side of the latent that sampling paints by default")
    in_channels: Positive = 4
    out_channels: Positive = 4
    down_block_types: tuple[Literal["CrossAttnDownBlock2D", "DownBlock2D"], ...] = (
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    )
    mid_block_type: Literal["UNetMidBlock2DCrossAttn", "UNetMidBlock2D"] | None = Field(
        "UNetMidBlock2DCrossAttn", description="without attention, or null = none: distilled models"
    )
    up_block_types: tuple[Literal["CrossAttnUpBlock2D", "UpBlock2D"], ...] = (
        "UpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
    )
    block_out_channels: tuple[Positive, ...] = (320, 640, 1280, 1280)
    layers_per_block: Positive | tuple[Positive, ...] = 2
    cross_attention_dim: Positive = Field(768, description="width D of the text states")
    attention_head_dim: Positive | tuple[Positive, ...] = Field(
        8, description="number of HEADS: diffusers' misnomer"
    )
    transformer_layers_per_block: Positive | tuple[Depth, ...] = 1
    reverse_transformer_layers_per_block: tuple[Depth, ...] | None = Field(
        None, description="the way up, deepest level first; null = mirrors the way down"
    )
    use_linear_projection: bool = False
    norm_num_groups: Positive = 32
    norm_eps: float = Field(1e-5, gt=0.0)
    dropout: Fraction = 0.0
    addition_embed_type: Literal["text_time"] | None = Field(
        None, description="SDXL's size and pooled-text input"
    )
    addition_time_embed_dim: Positive | None = None
    projection_class_embeddings_input_dim: Positive | None = None

    @property
    def levels(self) -> int:
        """Number of resolutions."""
        return len(self.block_out_channels)

    @property
    def downsampling(self) -> int:
        """Latent pixels of the input side per pixel at the lowest level."""
        return int(2 ** (self.levels - 1))

    def heads(self, level: int) -> int:
        """Return the attention heads at a level, 0 being the finest."""
        heads = self.attention_head_dim
        return heads if isinstance(heads, int) else heads[level]

    def layers(self, level: int) -> int:
        """Return the residual blocks on the way down at a level; the way up has one more."""
        layers = self.layers_per_block
        return layers if isinstance(layers, int) else layers[level]

    def depths_down(self, level: int) -> tuple[int, ...]:
        """Return the transformer blocks behind each residual block of a level on the way down."""
        return self._each(self._depth(level), self.layers(level))

    def depths_up(self, level: int) -> tuple[int, ...]:
        """Return the transformer blocks behind each residual block of a level on the way up."""
        reverse = self.reverse_transformer_layers_per_block
        depth = self._depth(level) if reverse is None else reverse[self.levels - 1 - level]
        return self._each(depth, self.layers(level) + 1)

    @property
    def depth_mid(self) -> int:
        """Transformer blocks between the two residual blocks at the bottom."""
        return self._each(self._depth(self.levels - 1), 1)[0]

    def _depth(self, level: int) -> int | tuple[int, ...]:
        depth = self.transformer_layers_per_block
        return depth if isinstance(depth, int) else depth[level]

    @staticmethod
    def _each(depth: int | tuple[int, ...], layers: int) -> tuple[int, ...]:
        return (depth,) * layers if isinstance(depth, int) else depth

    @model_validator(mode="after")
    def _levels_agree(self) -> Self:
        for name in (
            "down_block_types",
            "up_block_types",
            "layers_per_block",
            "attention_head_dim",
            "transformer_layers_per_block",
            "reverse_transformer_layers_per_block",
        ):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != self.levels:
                raise ValueError(
                    f"{name} has {len(value)} entries, block_out_channels has {self.levels}: give one a level"
                )
        return self

    @model_validator(mode="after")
    def _widths_divide(self) -> Self:
        for level, width in enumerate(self.block_out_channels):
            if width % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels {width} is not a multiple of norm_num_groups {self.norm_num_groups}"
                )
            if width % self.heads(level):
                raise ValueError(
                    f"attention_head_dim {self.heads(level)} (heads) does not divide block_out_channels {width}"
                )
        return self

    @model_validator(mode="after")
    def _every_layer_has_its_depth(self) -> Self:
        depths = self.transformer_layers_per_block
        nested = isinstance(depths, tuple) and any(isinstance(depth, tuple) for depth in depths)
        if nested and self.reverse_transformer_layers_per_block is None:
            raise ValueError(
                "transformer_layers_per_block gives each layer its own depth: give those of the way up as "
                "reverse_transformer_layers_per_block"
            )
        for level in range(self.levels):
            for way, found, layers in (
                ("down", self.depths_down(level), self.layers(level)),
                ("up", self.depths_up(level), self.layers(level) + 1),
            ):
                if len(found) != layers:
                    raise ValueError(
                        f"level {level} has {layers} layers on the way {way}, its depths are {list(found)}: give one a "
                        "layer, or one number"
                    )
        return self

    @model_validator(mode="after")
    def _text_time_is_whole(self) -> Self:
        sdxl = (self.addition_time_embed_dim, self.projection_class_embeddings_input_dim)
        if (self.addition_embed_type is None) != (sdxl == (None, None)) or (
            self.addition_embed_type is not None and None in sdxl
        ):
            raise ValueError(
                "addition_embed_type, addition_time_embed_dim and projection_class_embeddings_input_dim go together"
            )
        return self
