"""The first stage sees the pictures, captions and split that the data set will have."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.config_file import load_config
from pipeline.errors import DataError
from pipeline.latents.reader import LatentDataset
from preprocessing.pairs import prepared_pairs
from tests.preprocessing.builders import NumpyEncoder, image_file, noise, pairs, solid, write_input
from tests.preprocessing.conftest import Prepared

ROOT = Path(__file__).resolve().parents[2]


def test_pairs_are_those_of_the_data_set(prepared: Prepared) -> None:
    found = {pair.key: pair for pair in prepared_pairs(prepared.config.encode)}
    assert len(found) == 18
    for split in ("train", "validation"):
        dataset = LatentDataset(prepared.out, split)
        for index in range(len(dataset)):
            sample = dataset.read(index)
            pair = found.pop(f"{sample.key[:5]}/{sample.key}")
            assert pair.split == split and pair.caption == sample.record["captions"][0]
            assert np.array_equal(
                NumpyEncoder().moments(pair.image).astype(np.float16), sample.arrays["latent"]
            )
    assert found == {}


def test_what_is_not_usable_is_counted(tmp_path: Path) -> None:
    prepared = Prepared(tmp_path)
    clear = image_file(np.concatenate([solid((0, 0, 0)), solid((0,))], axis=-1))
    files = [
        *pairs(["a", "b"]),
        ("clear.png", clear),
        ("clear.txt", b"x"),
        ("bad.png", b"no"),
        ("bad.txt", b"x"),
    ]
    write_input(prepared.source, {"00000": files})
    found = prepared_pairs(prepared.config.encode)
    assert (found.counts.read, found.counts.written, found.counts.rejected) == (4, 3, {"not_image": 1})
    assert [pair.key for pair in found] == ["00000/a", "00000/b", "00000/clear"]
    assert (found[2].image == 255).all() and found[-1].key == found[2].key
    assert [pair.key for pair in found[:2]] == ["00000/a", "00000/b"]
    with pytest.raises(IndexError):
        found[3]


def test_equal_keys_in_two_shards_stay_apart(tmp_path: Path) -> None:
    prepared = Prepared(tmp_path)
    write_input(prepared.source, {"00000": pairs(["a"]), "00001": pairs(["a"], 1)})
    found = prepared_pairs(prepared.config.encode)
    assert [pair.key for pair in found] == ["00000/a", "00001/a"]
    assert not np.array_equal(found[0].image, found[1].image)


def test_the_autoencoder_may_learn_from_more_pictures_than_the_run_trains_on() -> None:
    own = "first_stage.autoencoder.filters=[{column: part, reason: held_out, equals: train}]"
    config = load_config(
        ROOT / "configs" / "demo.yaml", [own, f"encode.source={ROOT / 'examples' / 'emoji'}"]
    )
    of_the_run, of_the_autoencoder = (
        {pair.caption for pair in prepared_pairs(encode)}
        for encode in (config.encode, config.autoencoder_source)
    )
    assert of_the_run < of_the_autoencoder and len(of_the_run) == 135 + 8
    assert config.autoencoder_source.model_copy(update={"filters": config.encode.filters}) == config.encode
    null = load_config(ROOT / "configs" / "demo.yaml", ["first_stage.autoencoder.filters=null"])
    assert null.autoencoder_source is null.encode


def test_nothing_usable_and_damage_are_errors(tmp_path: Path) -> None:
    prepared = Prepared(tmp_path)
    write_input(prepared.source, {"00000": [("a.png", image_file(noise(0)))]})
    with pytest.raises(DataError, match=r"none of 1 samples is usable: .'no_caption': 1"):
        prepared_pairs(prepared.config.encode)
    write_input(prepared.source, {"00000": pairs(["a"])}, successes={"00000": 2})
    with pytest.raises(DataError, match="1 lost"):
        prepared_pairs(prepared.config.encode)
