"""What `ldm check` says of the engine: the derived config, and the combinations that are refused with their reasons."""

from pathlib import Path

import pytest

from launch.check import check_config
from pipeline.config.engine import REFUSALS
from pipeline.errors import ConfigError
from tests.faults.outcome import ROOT

DEMO = Path("configs/small.yaml")


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_the_page_shows_the_derived_config_with_the_hatch_and_what_is_never_allowed() -> None:
    page = check_config(DEMO, ["engine.deepspeed={zero_optimization: {sub_group_size: 77}}"])
    assert "'sub_group_size': 77" in page
    for refusal in REFUSALS:
        assert refusal.reason in page and refusal.remedy in page


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["engine.zero_stage=0", "engine.precision=bf16"], "stray Adam step"),
        (["engine.zero_stage=0", "engine.precision=fp16"], "stray Adam step"),
        (
            ["engine.zero_stage=0", "engine.precision=fp32", "engine.offload_optimizer=true"],
            "no ZeRO partition",
        ),
        (["engine.deepspeed={zero_optimization: {round_robin_gradients: true}}"], "names the wrong weights"),
        (
            ["engine.deepspeed={optimizer: {type: Adam}}"],
            "engine.deepspeed.optimizer: follows from optimizer",
        ),
        (
            [
                "model.addition_embed_type=text_time",
                "model.addition_time_embed_dim=8",
                "model.projection_class_embeddings_input_dim=80",
            ],
            "encode.text_encoder_2: null, but",
        ),
        (["encode.buckets=[[64, 64], [64, 72]]"], r"encode.buckets: 64 x 72 pixels; .* multiples of \d+"),
        (["encode.bucket_step=12"], r"encode.bucket_step: 12 pixels; .* give a multiple of \d+"),
    ],
)
def test_a_refused_combination_is_told_with_its_reason(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_config(DEMO, overrides)


def test_what_the_metrics_of_pictures_lack_is_said_at_once() -> None:
    chosen = ["name=never-run", "evaluate.metrics=[kid, clip, memorisation]"]
    check_config(DEMO, chosen)  # The CLIP is trained in the run.
    with pytest.raises(ConfigError) as raised:
        check_config(DEMO, [*chosen, "evaluate.features=nowhere.pth", "evaluate.reference=no/pictures"])
    assert "evaluate.features: nowhere.pth is not there" in str(raised.value)
    assert "evaluate.reference: no/pictures is no folder" in str(raised.value)
    with pytest.raises(ConfigError, match=r"(?s)evaluate.features: null, and .*evaluate.clip: null, and"):
        check_config(DEMO, [*chosen, "first_stage=null"])


def test_the_hatch_is_checked_together_with_the_rest() -> None:
    with pytest.raises(ConfigError) as raised:
        check_config(
            DEMO, ["engine.deepspeed={scheduler: {}, fp16: {enabled: true}}", "optimizer.warmup_steps=999999"]
        )
    assert len(raised.value.problems) == 3
