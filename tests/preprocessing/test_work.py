"""The verbs on real, tiny models and real emoji: encode, finalize, verify, report."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import RunConfig
from pipeline.config_file import dump_config
from pipeline.errors import ConfigError
from pipeline.latents.manifest import Manifest
from pipeline.latents.reader import LatentDataset
from pipeline.models.autoencoder import FrozenAutoencoder
from pipeline.models.pixels import images_from_pixels
from pipeline.models.text_encoder import FrozenTextEncoder
from pipeline.paths import RunPaths
from preprocessing.finalize import finalize_dataset
from preprocessing.pairs import prepared_pairs
from preprocessing.report import write_report
from preprocessing.sources import list_shards
from preprocessing.verify import verify_dataset
from preprocessing.work import encode_dataset
from tests.builders import tiny_autoencoder, tiny_clip, tiny_config
from tests.preprocessing.builders import Files, write_input

ROOT = Path(__file__).parents[2]
EMOJI = ROOT / "examples/emoji"


@dataclasses.dataclass(frozen=True)
class Chain:
    config: RunConfig
    paths: RunPaths
    source: Path

    def encode(self, out: Path, worker: int = 0, workers: int = 1) -> None:
        encode_dataset(
            self.config,
            source=self.source,
            out=out,
            autoencoder=self.paths.autoencoder,
            text_encoder=self.paths.text_encoder,
            worker=worker,
            workers=workers,
        )


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    root = tmp_path_factory.mktemp("chain")
    source = root / "in"
    for number, shard in enumerate(list_shards(EMOJI)):
        files: Files = []
        for raw, _ in zip(shard.samples(), range(10), strict=False):
            assert raw.text is not None and raw.json is not None
            files += [
                (f"{raw.key}.json", raw.json),
                (f"{raw.key}.png", raw.image),
                (f"{raw.key}.txt", raw.text),
            ]
        write_input(source, {f"{number:05d}": files})
    config = tiny_config(
        root / "runs", encode={"source": str(source), "image_size": 16, "batch": 8, "validation_samples": 5}
    )
    paths = RunPaths(root / "runs/tiny")
    tiny_autoencoder(paths.autoencoder)
    tiny_clip(paths.text_encoder, paths.clip)
    found = Chain(config, paths, source)
    found.encode(paths.latents)
    finalize_dataset(config, paths.latents, source)
    return found


def test_the_data_set_holds_what_the_models_say_of_the_prepared_pairs(chain: Chain) -> None:
    dataset = LatentDataset(chain.paths.latents, "train")
    assert Manifest.load(chain.paths.latents).splits == {"train": 25, "validation": 5}
    pairs = {pair.key.partition("/")[2]: pair for pair in prepared_pairs(chain.config.encode)}
    autoencoder = FrozenAutoencoder.load(chain.paths.autoencoder)
    words = FrozenTextEncoder.load(chain.paths.text_encoder)
    for index in range(len(dataset)):
        sample = dataset.read(index)
        pair = pairs[sample.key]
        assert pair.split == "train"
        moments = autoencoder.encode(images_from_pixels(pair.image[None]))[0].numpy()
        assert np.allclose(sample.arrays["latent"], moments, rtol=2e-3, atol=2e-4)
        tokens, _ = words.tokenize([pair.caption])
        assert np.array_equal(sample.arrays["tokens"], tokens.numpy())
        assert np.allclose(sample.arrays["text"], words.encode(tokens).numpy(), rtol=2e-3, atol=2e-3)
    null, (tokens, _) = dataset.null_text(), words.tokenize([""])
    assert np.array_equal(null["text"], words.encode(tokens).numpy().astype(np.float16))


def test_two_workers_make_the_same_bytes(chain: Chain, tmp_path: Path) -> None:
    for worker in (1, 0):
        chain.encode(tmp_path, worker, 2)
    ours = {
        p.relative_to(tmp_path): p.read_bytes()
        for p in tmp_path.rglob("*")
        if p.suffix in (".tar", ".parquet")
    }
    theirs = {name: (chain.paths.latents / name).read_bytes() for name in ours}
    assert len(ours) == 6 and ours == theirs
    assert (
        finalize_dataset(chain.config, tmp_path, chain.source).digest
        == Manifest.load(chain.paths.latents).digest
    )


def test_verify_and_report(chain: Chain) -> None:
    result = verify_dataset(chain.paths.latents, samples=None, decode_with=chain.paths.autoencoder)
    assert result.problems == [] and result.checked == 30
    assert write_report(chain.paths.latents, chain.source, chain.paths.autoencoder).stat().st_size > 10_000


def test_a_latent_that_decodes_to_nothing_is_a_problem(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        FrozenAutoencoder, "decode", lambda self, latents: torch.full((1, 3, 16, 16), torch.nan)
    )
    found = verify_dataset(chain.paths.latents, samples=2, decode_with=chain.paths.autoencoder)
    said = [problem for problem in found.problems if "decodes to a picture that is not finite" in problem]
    assert len(said) == 4, "two of each split"


def test_the_verb_starts_its_own_workers(chain: Chain, tmp_path: Path) -> None:
    """`ldm encode` alone with two processes: the same bytes, and a page on the whole set at the end."""
    path = tmp_path / "tiny.yaml"
    path.write_text(dump_config(chain.config))
    models = [
        f"encode.autoencoder={chain.paths.autoencoder}",
        f"encode.text_encoder={chain.paths.text_encoder}",
    ]
    command = [
        sys.executable,
        "-m",
        "launch.cli",
        "encode",
        str(path),
        f"runs={tmp_path}",
        "encode.processes=2",
    ]
    done = subprocess.run([*command, *models], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "3 of 3 shards done, 0 leased, 0 left" in done.stdout and "read 30, written 30" in done.stdout
    latents = RunPaths(tmp_path / "tiny").latents
    for name in ("00/00000.tar", "00/00001.tar"):
        assert (latents / name).read_bytes() == (chain.paths.latents / name).read_bytes()


def test_workers_are_numbered_from_zero(chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="worker 2 of 2: give 0 to 1"):
        chain.encode(tmp_path, 2, 2)
