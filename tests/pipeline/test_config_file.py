"""The config says everything that is wrong with it, at once, with the line and the likely key."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import RunConfig
from pipeline.config_file import dump_config, load_config
from pipeline.errors import ConfigError

SMALLEST = """\
name: t
encode: {source: x, image_size: 64}
model: {}
engine: {global_batch: 8, micro_batch: 4}
train: {steps: 10}
"""


def problems(tmp_path: Path, text: str | bytes, *overrides: str) -> list[str]:
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert caught.value.exit_code == 2
    return caught.value.problems


def loaded(tmp_path: Path, text: str, *overrides: str) -> RunConfig:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return load_config(path, overrides)


def test_all_problems_at_once_with_line_and_likely_key(tmp_path: Path) -> None:
    text = SMALLEST + "optimizer:\n  learnign_rate: 1e-4\n  beta1: 1.5\nmodle: 3\n"
    found = problems(tmp_path, text, "ema.decay=2", "nonsense")
    joined = "\n".join(found)
    assert "c.yaml:7: optimizer.learnign_rate: unknown key; did you mean 'learning_rate'?" in joined
    assert "c.yaml:8: optimizer.beta1" in joined and "less than 1" in joined and "got 1.5" in joined
    assert "c.yaml:9: modle: unknown key; did you mean 'model'?" in joined
    assert "override ema.decay: " in joined and "got 2" in joined
    assert "override 'nonsense'" in joined
    assert len(found) == 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not a map"),
        ("- a\n- b\n", "not a map"),
        ("\tname: t\n", "c.yaml:1"),
        (SMALLEST + "name: again\n", "duplicate key"),
        (b"\xff\xfe\x00binary", "not UTF-8"),
        (SMALLEST + "seed: !!python/object/apply:os.system ['touch pwned']\n", "seed"),
        (
            "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
            + "".join(
                f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(6)
            ),
            "more than",
        ),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, text: str | bytes, said: str) -> None:
    found = problems(tmp_path, text)
    assert said in found[0] and "\n" not in found[0]
    assert not Path("pwned").exists()


def test_missing_file_and_missing_keys_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        load_config(tmp_path / "nowhere.yaml")
    joined = "\n".join(problems(tmp_path, "name: t\n"))
    for key in ("encode", "model", "engine", "train"):
        assert f"{key}: missing" in joined


def test_numbers_are_yaml_1_2(tmp_path: Path) -> None:
    config = loaded(tmp_path, SMALLEST + "optimizer: {learning_rate: 1e-4}\n", "cluster.time=12:30:00")
    assert config.optimizer.learning_rate == 1e-4
    assert config.cluster.time == "12:30:00"
    assert "quote it" in "".join(problems(tmp_path, SMALLEST + "cluster: {account: 0123}\n"))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.learning_rate=0", "greater than 0"),
        ("optimizer.learning_rate=.nan", "finite"),
        ("optimizer.learning_rate=-1", "greater than 0"),
        ("optimizer.learning_rate=fast", "number"),
        ("engine.global_batch=0", "greater than or equal to 1"),
        ("objective.caption_dropout=1.5", "less than or equal to 1"),
        ("objective.caption_dropout=-0.1", "greater than or equal to 0"),
        ("ema.decay=1.0", "less than 1"),
        ("name=a/../b", "pattern"),
        ("cluster.nodes=0", "greater than or equal to 1"),
        ("cluster.time='99'", "pattern"),
        ("train.steps=true", "integer"),
        ("engine.precision=bf17", "bf16"),
        ("engine={global_batch: 2, micro_batch: 1, processes: 3}", "smaller than processes"),
        ("engine={global_batch: 2, micro_batch: 1, zero_stage: 0, precision: bf16}", "stray Adam step"),
        ("model.block_out_channels=[320, 640]", "block_out_channels has 2"),
        ("model.norm_num_groups=33", "not a multiple of norm_num_groups"),
        ("model.addition_embed_type=text_time", "go together"),
        ("train.keep_last=1", "greater than or equal to 2"),
    ],
)
def test_impossible_values_name_key_value_and_limit(tmp_path: Path, override: str, said: str) -> None:
    (line,) = problems(tmp_path, SMALLEST, override)
    assert said in line


def test_every_default_is_spelt_out_and_read_back(tmp_path: Path) -> None:
    config = loaded(tmp_path, SMALLEST, "engine.deepspeed={zero_optimization: {stage: 2}}")
    again = loaded(tmp_path, dump_config(config))
    assert again == config
    assert json.loads(again.model_dump_json())["engine"]["deepspeed"] == {"zero_optimization": {"stage": 2}}


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=30), st.text(max_size=30))
def test_any_override_ends_in_a_config_or_a_line(key: str, value: str) -> None:
    path = Path(__file__).parent.parent.parent / "configs" / "small.yaml"
    try:
        load_config(path, [f"{key}={value}"])
    except ConfigError as error:
        assert error.problems and all(error.problems)
