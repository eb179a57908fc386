"""The verbs of a data set through the door: what each says on stdout, and the code it leaves with when something is wrong."""

import json
import shutil
from pathlib import Path

import pytest

from launch.cli import main
from pipeline.config_file import dump_config
from pipeline.latents.manifest import Manifest
from tests.builders import tiny_autoencoder, tiny_clip, tiny_config
from tests.preprocessing.builders import pairs, write_input


class Door:
    """A folder with a config, its input and its models; every verb is one call."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.source, self.config = root / "in", root / "tiny.yaml"
        self.dataset = root / "runs/tiny/latents"
        self.autoencoder = tiny_autoencoder(root / "runs/tiny/autoencoder")
        tiny_clip(root / "runs/tiny/text_encoder", root / "runs/tiny/clip")
        bad = [("bad.png", b""), ("bad.txt", b"x")]
        write_input(
            self.source,
            {
                "00000": [*pairs([f"a{k}" for k in range(6)]), *bad],
                "00001": pairs([f"b{k}" for k in range(5)], 9),
            },
        )
        encode = {"source": str(self.source), "image_size": 16, "batch": 4, "validation_samples": 3}
        self.config.write_text(dump_config(tiny_config(root / "runs", encode=encode)))
        self._capsys = capsys

    def ldm(self, *words: object) -> tuple[int, str, str]:
        """Return exit code, stdout and stderr of the verb."""
        self._capsys.readouterr()
        code: object = 0
        try:
            main([str(word) for word in words])
        except SystemExit as left:
            code = left.code or 0
        said = self._capsys.readouterr()
        assert isinstance(code, int)
        return code, said.out, said.err


@pytest.fixture
def door(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Door:
    monkeypatch.setenv("LDM_QUIET", "1")
    return Door(tmp_path, capsys)


def test_from_shards_to_a_checked_data_set(door: Door) -> None:
    code, out, _ = door.ldm("encode", door.config)
    assert (
        code == 0
        and "2 shards encoded, 0 finished before: 12 read = 11 written + 1 rejected {'empty': 1} + 0 failed"
        in out
    )
    assert door.ldm("verify", door.dataset)[0] == 3, "no manifest yet"
    code, out, _ = door.ldm("status", door.dataset)
    assert code == 0 and "2 of 2 shards done, 0 leased, 0 left" in out and "rejected(empty) 1" in out
    code, out, _ = door.ldm("finalize", door.config, "--json")
    told = json.loads(out)
    manifest = Manifest.load(door.dataset)
    assert code == 0 and told["digest"] == manifest.digest and told["splits"] == {"train": 8, "validation": 3}
    assert (told["counts"]["read"], told["counts"]["written"], told["counts"]["rejected"]) == (
        12,
        11,
        {"empty": 1},
    )
    code, out, _ = door.ldm("status", door.dataset)
    assert code == 0 and f"finished, {manifest.splits}" in out and "rejected(empty) 1" in out
    code, out, _ = door.ldm("verify", door.dataset)
    assert code == 0 and "11 samples checked, no problems" in out
    options = ["--samples", 2, "--decode-with", door.autoencoder, "--source", door.source]
    code, out, _ = door.ldm("verify", door.dataset, *options)
    assert (
        code == 0 and "4 samples checked" in out and "11 latents decoded beside their originals, PSNR" in out
    )
    code, out, _ = door.ldm(
        "report", door.dataset, "--source", door.source, "--autoencoder", door.autoencoder
    )
    assert code == 0 and out.strip() == str(door.dataset / "report.html")
    page = (door.dataset / "report.html").read_text()
    assert page.count("<img ") == 22 and "rejected: empty" in page and manifest.digest in page


def test_damage_to_a_finished_data_set_is_listed_and_is_code_3(door: Door) -> None:
    assert door.ldm("encode", door.config)[0] == door.ldm("finalize", door.config)[0] == 0
    for stem in ("00000", "00001"):
        tar = door.dataset / f"00/{stem}.tar"
        content = bytearray(tar.read_bytes())
        content[700] ^= 1
        tar.write_bytes(content)
    code, out, err = door.ldm("verify", door.dataset)
    assert code == 3 and out == "" and "Traceback" not in err
    assert all(f"{stem}.tar: its sha256 is not the one in its marker" in err for stem in ("00000", "00001"))


def test_a_damaged_input_shard_and_what_comes_of_it(door: Door) -> None:
    tar = door.source / "00001.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:3000])
    code, _, err = door.ldm("encode", door.config)
    assert code == 3 and f"{tar}: " in err and "5 samples expected" in err and "Traceback" not in err
    code, _, err = door.ldm("finalize", door.config)
    assert code == 3 and "1 of 2 input shards are not encoded: 00001" in err
    assert not (door.dataset / "manifest.json").exists()
    tar.write_bytes(whole)
    code, out, _ = door.ldm("encode", door.config)
    assert code == 0 and "1 shards encoded, 1 finished before" in out
    assert door.ldm("finalize", door.config)[0] == 0
    code, _, err = door.ldm("encode", door.config, "encode.background=[0, 0, 0]")
    assert code == 3 and "preprocessing.background: [255, 255, 255] on disk, [0, 0, 0] wanted" in err


def test_too_many_failures_and_a_source_that_is_gone(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(payload: bytes, rules: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr("preprocessing.images.prepare_image", broken)
        code, _, err = door.ldm("encode", door.config)
    assert code == 3 and "samples failed (ZeroDivisionError" in err and "encode.max_failed_fraction" in err
    shutil.rmtree(door.source)
    code, _, err = door.ldm("encode", door.config)
    assert code in (2, 3) and str(door.source) in err and "Traceback" not in err
