"""The shape of the cross-attention U-Net."""

from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.config.base import Fraction, Positive, Section


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
    up_block_types: tuple[Literal["CrossAttnUpBlock2D", "UpBlock2D"], ...] = (
        "UpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
    )
    block_out_channels: tuple[Positive, ...] = (320, 640, 1280, 1280)
    layers_per_block: Positive = 2
    cross_attention_dim: Positive = Field(768, description="width D of the text states")
    attention_head_dim: Positive | tuple[Positive, ...] = Field(
        8, description="number of HEADS: diffusers' misnomer"
    )
    transformer_layers_per_block: Positive | tuple[Positive, ...] = 1
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
    def downsampling(self) -> int:
        """Latent pixels of the input side per pixel at the lowest level."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @model_validator(mode="after")
    def _levels_agree(self) -> Self:
        levels = len(self.block_out_channels)
        for name in (
            "down_block_types",
            "up_block_types",
            "attention_head_dim",
            "transformer_layers_per_block",
        ):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != levels:
                raise ValueError(
                    f"{name} has {len(value)} entries, block_out_channels has {levels}: give one a level"
                )
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels {width} is not a multiple of norm_num_groups {self.norm_num_groups}"
                )
        heads = self.attention_head_dim
        for width, count in zip(
            self.block_out_channels, heads if isinstance(heads, tuple) else (heads,) * levels, strict=True
        ):
            if width % count:
                raise ValueError(
                    f"attention_head_dim {count} (heads) does not divide block_out_channels {width}"
                )
        sdxl = (self.addition_time_embed_dim, self.projection_class_embeddings_input_dim)
        if (self.addition_embed_type is None) != (sdxl == (None, None)) or (
            self.addition_embed_type is not None and None in sdxl
        ):
            raise ValueError(
                "addition_embed_type, addition_time_embed_dim and projection_class_embeddings_input_dim go together"
            )
        return self
