"""`ldm init` from the door: complete commented config, report, one line for every mistake, nothing overwritten."""

import json
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from launch.check import check_config
from launch.cli import main
from launch.init.commented import commented, written
from launch.init.folder import init_folder, named_after
from launch.init.proposal import Machine
from pipeline.config import RunConfig
from pipeline.config_file import load_config
from pipeline.errors import ConfigError
from tests.launch.init.folders import picture, write_folder

ROOT = Path(__file__).parents[3]
TWO_CORES, GPUS = Machine("cpu", cores=2, gpus=8), Machine("gpu", cores=16, gpus=8)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    captions = [f"<b>thing</b> {number} & more" for number in range(24)]
    return write_folder(tmp_path / "My photos!", [picture(n) for n in range(24)], captions)


def unset(section: BaseModel) -> list[str]:
    """Return the fields of a section and those in it that the file left to their defaults."""
    found = [name for name in type(section).model_fields if name not in section.model_fields_set]
    inner = [value for value in section.__dict__.values() if isinstance(value, BaseModel)]
    return found + [name for part in inner for name in unset(part)]


def test_the_config_is_complete_commented_checked_and_reads_back(source: Path, tmp_path: Path) -> None:
    files = init_folder(str(source), tmp_path, TWO_CORES)
    assert files.config == tmp_path / "My-photos.yaml" and files.report == tmp_path / "My-photos.html"
    config = load_config(files.config)
    assert config.name == "My-photos" and unset(config) == []
    assert check_config(files.config).startswith(f"{files.config}: ok")
    lines = files.config.read_text().splitlines()
    for place, line in enumerate(lines):
        if re.match(r"\s*[a-z_0-9]+: ", line):
            above = lines[place - 1].strip()
            assert "  # " in line or " # " in line or above.startswith("#"), line
        assert len(line) <= 120 or str(tmp_path) in line, line


def test_a_gpu_config_asks_for_two_folders_and_nothing_else(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = init_folder(str(source), tmp_path, GPUS)
    with pytest.raises(ConfigError) as raised:
        check_config(files.config)
    assert [problem.split(": ")[1] for problem in raised.value.problems] == [
        "encode.autoencoder",
        "encode.text_encoder",
    ]
    for name in ("sd-vae", "clip-vit-large-patch14"):
        (tmp_path / "models" / name).mkdir(parents=True)
    assert "ok" in check_config(files.config)


@pytest.mark.parametrize("name", ["demo", "sd15-256", "sd15-512", "sd2-512", "sdxl-1024"])
def test_any_config_survives_being_written_with_comments(name: str, tmp_path: Path) -> None:
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    (tmp_path / "again.yaml").write_text(commented(config, {"seed": "why: {not} # so"}, "small.yaml", "a\nb"))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    "value",
    [
        1e-4,
        2.5e-07,
        1e22,
        0.1,
        3,
        "1e5",
        "null",
        "yes",
        "a: b # c",
        "\N{SNOWMAN}\n'\"",
        "",
        "-x",
        {"a": [1, None]},
    ],
)
def test_any_value_reads_back(value: object, tmp_path: Path) -> None:
    base = load_config(ROOT / "configs" / "small.yaml")
    plain = json.loads(base.model_dump_json())
    plain["engine"]["deepspeed"] = {"x": value}
    config = RunConfig.model_validate_json(json.dumps(plain))
    (tmp_path / "c.yaml").write_text(commented(config, {}, "small.yaml", "h"))
    found = load_config(tmp_path / "c.yaml").engine.deepspeed["x"]
    assert found == value and type(found) is type(value)
    assert "\n" not in written(value)


def test_nothing_is_overwritten(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.html").write_text("kept")
    with pytest.raises(SystemExit) as left:
        main(["init", str(source), "--out", str(tmp_path), "--name", "mine"])
    said = capsys.readouterr().err.strip().splitlines()
    assert left.value.code == 2 and len(said) == 1 and "mine.html is there already" in said[0]
    assert not (tmp_path / "mine.yaml").exists() and (tmp_path / "mine.html").read_text() == "kept"


def test_mistakes_are_one_line(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, code, said in (
        ([str(tmp_path / "nowhere")], 3, "not a folder"),
        ([str(tmp_path / "empty")], 3, "no tars, no parquet shards and no pictures"),
        ([str(source), "--name", "../x"], 2, "letters, digits"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["init", *arguments, "--out", str(tmp_path), "--device", "cpu"])
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ldm: ")]
        assert left.value.code == code and len(lines) == 1 and said in lines[0]
    assert not list(tmp_path.glob("*.yaml"))


def test_the_report_stands_alone_and_escapes_what_it_shows(source: Path, tmp_path: Path) -> None:
    page = init_folder(str(source), tmp_path, TWO_CORES).report.read_text()
    assert "&lt;b&gt;thing&lt;/b&gt; 3 &amp;amp; more" not in page
    assert "<b>thing</b>" not in page and "&lt;b&gt;thing&lt;/b&gt;" in page
    assert not re.search(r"(?:src|href)='?\"?https?:", page) and "<script" not in page
    assert page.count("data:image/png;base64,") == 24 and "default-src 'none'" in page
    for words in (
        "encode.image_size",
        "shorter side",
        "visits of each concept",
        "different ones",
        "train.steps",
    ):
        assert words in page


@pytest.mark.parametrize(
    ("source", "name"),
    [("s3://bucket/a b", "a-b"), ("photos/", "photos"), ("/x/_hidden_", "hidden"), ("/x/\N{SNOWMAN}", "own")],
)
def test_the_name_comes_from_the_folder(source: str, name: str) -> None:
    assert named_after(source.rstrip("/")) == name
