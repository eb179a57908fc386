"""Every knob of a run with its unit and its reason, as strict frozen models.

No class path and no code stands in a config; a component receives its own section only. Numbers that follow
from others (micro-batches, DeepSpeed's JSON, latent sizes) are computed, never set. Reading files, overrides
and error lines are `pipeline.config_file`'s job.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")]


class Section(BaseModel):
    """A part of the config: strict types, unknown keys refused, frozen once read."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class DataConfig(Section):
    """The latent data set that training reads, and the order it is read in."""

    dataset: str | None = Field(None, description="folder with manifest.json; null = RUN/latents")
    order: Literal["global"] = Field("global", description="uniform over everything: for local disks")
    threads: Positive = Field(
        2, description="reader threads a rank; latents need no decoding, so few suffice"
    )
    prefetch: Positive = Field(4, description="micro-batches kept ready a rank")
    verify: Literal["off", "sample", "all"] = Field("sample", description="checksums looked at on opening")


class EncodeConfig(Section):
    """Image-caption shards in, latent data set out."""

    source: str = Field(
        description="folder of img2dataset shards, or of images with .txt captions beside them"
    )
    autoencoder: str | None = Field(
        None, description="diffusers AutoencoderKL folder; null = RUN/autoencoder"
    )
    text_encoder: str | None = Field(None, description="transformers text folder; null = RUN/text_encoder")
    image_size: Positive = Field(description="pixels of the square side after resize and centre crop")
    latent: Literal["moments", "mean"] = Field(
        "moments", description="moments re-sample the posterior each visit"
    )
    text: Literal["embeddings", "tokens"] = Field(
        "embeddings",
        description="embeddings cost 118 KB a caption (CLIP-L), tokens 154 B and 0.5-2.5 % of a step",
    )
    max_captions: Positive = Field(1, description="captions kept a sample; surplus is counted")
    batch: Positive = Field(16, description="images encoded at once; part of the fingerprint")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="compute type of the frozen encoders")
    validation_samples: Count = Field(
        64, description="pairs with the smallest key hash are kept from training, so the choice never moves"
    )
    background: tuple[int, int, int] = Field(
        (255, 255, 255), description="RGB 0-255 under transparent pixels"
    )
    min_side: Positive = Field(1, description="pixels; smaller originals are rejected(too_small)")
    max_aspect: float = Field(4.0, ge=1.0, description="longer over shorter side; beyond is rejected(aspect)")
    max_pixels: Positive = Field(64_000_000, description="pixels; larger are rejected before decoding")
    max_failed_fraction: Fraction = Field(0.01, description="failed(error) above this share stops the job")


class AutoencoderConfig(Section):
    """The first stage: a KL autoencoder trained on the source images, then frozen."""

    latent_channels: Positive = Field(4, description="channels of the latent")
    block_out_channels: tuple[Positive, ...] = Field(
        (128, 256, 512, 512), description="widths; each but one halves"
    )
    layers_per_block: Positive = Field(2, description="residual blocks a level")
    norm_num_groups: Positive = Field(32, description="groups of GroupNorm")
    mid_block_attention: bool = Field(True, description="self-attention at the lowest resolution")
    kl_weight: float = Field(1e-6, ge=0.0, description="weight of the KL term against L1 (LDM: 1e-6)")
    learning_rate: float = Field(1e-3, gt=0.0, description="AdamW, cosine to zero")
    batch: Positive = Field(8, description="images a step over all processes")
    steps: Positive = Field(description="optimizer steps")
    warmup_steps: Count = Field(50, description="linear warm-up steps")
    clip_grad_norm: float = Field(1.0, gt=0.0, description="bound of the gradient's norm")
    precision: Literal["fp32", "bf16"] = Field("bf16", description="autocast type of the training")
    checkpoint_every: Positive = Field(200, description="steps between resumable checkpoints")
    log_every: Positive = Field(20, description="steps between records")

    @property
    def downsampling(self) -> int:
        """Pixels of the image side per latent side."""
        return int(2 ** (len(self.block_out_channels) - 1))


class ClipConfig(Section):
    """A small CLIP trained on the source pairs, whose text tower conditions the U-Net."""

    width: Positive = Field(
        128, description="width of both towers and of the text states the U-Net attends to"
    )
    vision_layers: Positive = Field(3, description="transformer layers over patches")
    text_layers: Positive = Field(2, description="transformer layers over tokens")
    heads: Positive = Field(4, description="attention heads; divides the width")
    patch: Positive = Field(16, description="pixels of a patch side")
    vocabulary: Positive = Field(
        2048, description="entries of the byte-pair encoding trained on the captions"
    )
    max_tokens: Positive = Field(24, description="text length L with start and end tokens")
    learning_rate: float = Field(1e-3, gt=0.0, description="AdamW, cosine to zero")
    batch: Positive = Field(96, description="pairs a step: the contrastive negatives")
    steps: Positive = Field(description="optimizer steps")
    warmup_steps: Count = Field(50, description="linear warm-up steps")
    checkpoint_every: Positive = Field(200, description="steps between resumable checkpoints")
    log_every: Positive = Field(20, description="steps between records")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class FirstStageConfig(Section):
    """Models trained before the data is encoded, for those who have none for their domain."""

    autoencoder: AutoencoderConfig
    clip: ClipConfig


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


class ObjectiveConfig(Section):
    """What the network predicts, and the noise schedule shared by training and sampling."""

    prediction: Literal["epsilon", "v_prediction"] = Field(
        "epsilon", description="DDPM's noise, or Salimans' v"
    )
    schedule: Literal["scaled_linear", "linear"] = Field(
        "scaled_linear", description="LDM's betas: linear in sqrt"
    )
    timesteps: Positive = Field(1000, description="T of the discrete schedule")
    beta_start: float = Field(0.00085, gt=0.0, lt=1.0)
    beta_end: float = Field(0.012, gt=0.0, lt=1.0)
    timestep_draw: Literal["uniform", "stratified"] = Field(
        "stratified",
        description="stratified over each global batch lowers the variance of the loss for nothing",
    )
    caption_dropout: Fraction = Field(
        0.1, description="share of captions replaced by the null text, for guidance"
    )


class OptimizerConfig(Section):
    """AdamW on the fp32 masters."""

    learning_rate: float = Field(1e-4, gt=0.0, le=1.0)
    schedule: Literal["constant", "cosine", "inverse_sqrt"] = Field(
        "constant", description="after the warm-up"
    )
    warmup_steps: Count = Field(1000, description="linear from 0")
    beta1: float = Field(0.9, ge=0.0, lt=1.0)
    beta2: float = Field(0.999, ge=0.0, lt=1.0)
    epsilon: float = Field(1e-8, gt=0.0)
    weight_decay: float = Field(0.01, ge=0.0, description="on matrices and kernels; none on biases and norms")
    clip_grad_norm: float = Field(1.0, gt=0.0, description="bound of the global gradient norm")


class EngineConfig(Section):
    """Batch, processes, precision and ZeRO stage: DeepSpeed's own config is derived from these."""

    global_batch: Positive = Field(description="samples a step over all ranks: part of the run's mathematics")
    micro_batch: Positive = Field(description="most samples a rank holds at once: only memory and speed")
    processes: Positive = Field(
        1, description="processes `ldm train` starts on this machine outside of Slurm"
    )
    threads: Positive = Field(1, description="CPU threads a process")
    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="1 shards masters, moments and EMA over the ranks")
    precision: Literal["fp32", "bf16", "autocast_bf16"] = Field(
        "bf16", description="autocast keeps true fp32 weights; bf16 halves the weights' memory"
    )
    activation_checkpointing: bool = Field(False, description="a third more compute for far less memory")
    deepspeed: dict[str, Any] = Field(default_factory=dict, description="merged last into DeepSpeed's config")

    @model_validator(mode="after")
    def _known_traps(self) -> Self:
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError(
                "precision bf16 at zero_stage 0 takes a stray Adam step at start (DeepSpeed): use zero_stage 1 or autocast_bf16"
            )
        if self.global_batch < self.processes:
            raise ValueError(
                f"global_batch {self.global_batch} is smaller than processes {self.processes}: every rank needs a sample a step"
            )
        return self


class EmaConfig(Section):
    """The moving average of the fp32 masters that sampling uses."""

    decay: float = Field(0.9999, gt=0.0, lt=1.0, description="d after the ramp")
    ramp: bool = Field(True, description="min(d, (1 + s) / (10 + s)): short runs forget their start")


class TrainConfig(Section):
    """Length of the training and what happens between steps."""

    steps: Positive = Field(description="optimizer steps")
    log_every: Positive = Field(10, description="steps between records")
    checkpoint_every: Positive = Field(1000, description="steps between checkpoints")
    keep_last: Annotated[int, Field(ge=2)] = Field(
        3, description="checkpoints kept; two, so that one may be damaged"
    )
    max_seconds: float | None = Field(
        None, gt=0.0, description="save and leave with exit code 75 after this long"
    )
    max_skipped_in_a_row: Positive = Field(
        5, description="non-finite steps before the run ends with exit code 5"
    )


class EvaluateConfig(Section):
    """Validation loss with fixed noise at fixed timesteps."""

    timesteps: Positive = Field(
        8, description="equidistant timesteps; the mean over them is the validation loss"
    )
    batch: Positive = Field(64, description="samples at once")
    max_samples: Positive = Field(1024, description="validation samples used")


class SampleConfig(Section):
    """Pictures from prompts under classifier-free guidance."""

    prompts: tuple[str, ...] = Field((), description="empty = captions of the validation split")
    num_prompts: Positive = Field(16, description="how many captions are taken when no prompts are given")
    sampler: Literal["ddim", "dpm_solver_2m"] = Field(
        "dpm_solver_2m", description="DPM-Solver++ needs fewest steps"
    )
    steps: Positive = Field(25, description="network evaluations a picture")
    guidance_scale: float = Field(5.0, ge=0.0, description="1 = conditional only, 0 = unconditional")
    weights: Literal["ema", "raw"] = "ema"
    seed: Count = 0


class TrackingConfig(Section):
    """Where records go after metrics.jsonl."""

    mlflow: str = Field(
        "auto", description="auto = RUNS/mlflow.db unless under Slurm; off; or a tracking URI"
    )
    experiment: str = Field("ldm", min_length=1)


class ClusterConfig(Section):
    """The Slurm job of this run."""

    partition: str | None = None
    account: str | None = None
    nodes: Positive = 1
    tasks_per_node: Positive = Field(1, description="one task a device")
    gpus_per_node: Count = 0
    cpus_per_task: Positive = 1
    memory_gib_per_node: Count = Field(0, description="0 = all of the node's memory")
    time: str = Field(
        "24:00:00", pattern=r"^(\d+-)?\d{1,2}:\d{2}:\d{2}$", description="[days-]hours:minutes:seconds"
    )
    signal_lead_seconds: Positive = Field(
        300, description="warning before the time limit: at least two saves"
    )
    exclude: tuple[str, ...] = ()
    setup: tuple[str, ...] = Field(
        (), description="shell lines run before the job, for modules and environments"
    )


class RunConfig(Section):
    """One run, from source images to pictures. Paths are relative to the folder the command runs in."""

    name: Name
    seed: Count = 0
    runs: str = Field("runs", description="folder of the run folders")
    data: DataConfig = DataConfig()
    encode: EncodeConfig
    first_stage: FirstStageConfig | None = Field(
        None, description="null = both encoders come from local folders"
    )
    model: UNetConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig
    ema: EmaConfig = EmaConfig()
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    sample: SampleConfig = SampleConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()
