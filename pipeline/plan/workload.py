"""What a config asks of its devices, per sample and per parameter: everything that does not depend on how many there are."""

from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.config import RunConfig
from pipeline.latents.manifest import MANIFEST_NAME, Manifest
from pipeline.latents.record import JSON_STEP, stride_bytes
from pipeline.latents.spec import LatentSpec
from pipeline.paths import RunPaths, dataset_places
from pipeline.plan.encoders import Encoder, TextTower, encoders_of
from pipeline.plan.network import NetworkCost, network_cost
from pipeline.storage import is_remote
from pipeline.training.deepspeed_config import BUCKET_ELEMENTS

POOLED_WIDTH = 1280


@dataclass(frozen=True)
class Workload:
    """A training, seen by its costs."""

    config: RunConfig
    network: NetworkCost
    towers: tuple[TextTower, ...]
    encoder: Encoder
    spec: LatentSpec
    averages: int
    bucket_elements: int
    samples: int | None
    """In the training split of the data set; None = not made yet and not told."""

    @property
    def parameters(self) -> int:
        """Parameters of the network that learns."""
        return self.network.parameters

    @property
    def tokens_mode(self) -> bool:
        """Whether the frozen text encoder runs in every step."""
        return self.spec.text == "tokens"

    @property
    def text_flops(self) -> int:
        """FLOP of encoding one caption."""
        return sum(tower.flops for tower in self.towers)

    @property
    def text_parameters(self) -> int:
        """Weights of the text encoders."""
        return sum(tower.parameters for tower in self.towers)

    @property
    def sample_flops(self) -> int:
        """FLOP of one training sample as configured: with what is computed again and with text encoded online."""
        again = self.network.forward_flops if self.config.engine.activation_checkpointing else 0
        return self.network.training_flops + again + (self.text_flops if self.tokens_mode else 0)

    @property
    def picture(self) -> tuple[int, int]:
        """Height and width of the pictures in pixels; buckets have about as many."""
        return self.config.encode.image_size, self.config.encode.image_size

    def stored_bytes(self, text: str | None = None) -> int:
        """Return the bytes of one sample in its tar, for the configured kind of text or the one given."""
        spec = self.spec if text is None else replace(self.spec, text=text)  # type: ignore[arg-type]
        return stride_bytes(spec.members(self.picture), JSON_STEP)

    def encode_flops(self) -> int:
        """Return the FLOP of making one sample: its picture, and its captions where states are stored."""
        captions = 0 if self.tokens_mode else self.spec.max_captions * self.text_flops
        return self.encoder.flops(*self.picture) + captions


def workload_of(config: RunConfig, paths: RunPaths, samples: int | None = None) -> Workload:
    """Return the costs of the training that `config` describes, of `samples` samples where no data set says how many."""
    towers, encoder = encoders_of(config)
    spec = _spec(config, towers, encoder)
    side = config.encode.image_size // spec.downsampling
    network = network_cost(
        config.model, side, spec.text_tokens, checkpointing=config.engine.activation_checkpointing
    )
    posthoc = config.ema.posthoc
    averages = 1 + len(config.ema.more_decays) + (len(posthoc.sigma_rel) if posthoc else 0)
    zero = config.engine.deepspeed.get("zero_optimization", {})
    bucket = min(int(zero.get("reduce_bucket_size", BUCKET_ELEMENTS)), network.parameters)
    counted = _samples_of(config, paths)
    return Workload(
        config, network, towers, encoder, spec, averages, bucket, samples if counted is None else counted
    )


def _spec(config: RunConfig, towers: tuple[TextTower, ...], encoder: Encoder) -> LatentSpec:
    encode = config.encode
    tokens = encode.max_tokens or (towers[0].tokens if towers else 77)
    pooled = POOLED_WIDTH if config.model.addition_embed_type is not None else None
    return LatentSpec(
        latent=encode.latent,
        channels=config.model.in_channels,
        downsampling=encoder.downsampling,
        scaling_factor=1.0,
        shift_factor=0.0,
        text=encode.text,
        text_tokens=tokens,
        text_width=config.model.cross_attention_dim,
        pooled_width=pooled,
        max_captions=encode.max_captions,
    )


def _samples_of(config: RunConfig, paths: RunPaths) -> int | None:
    """Return the samples of the training splits; None where a data set is not there yet or lies in a store."""
    places = dataset_places(config, paths)
    if any(is_remote(place) or not Path(place, MANIFEST_NAME).is_file() for place in places):
        return None
    return sum(Manifest.load(Path(place)).splits["train"] for place in places)
