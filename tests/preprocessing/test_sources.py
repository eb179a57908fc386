"""Shards and folders are read whole or refused, and every file is accounted for."""

import dataclasses
import io
import json
import os
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import DataError
from preprocessing import samples, sources
from preprocessing.samples import RawSample, SamplesDigest
from preprocessing.sources import InputShard, list_shards
from tests.preprocessing.builders import Files, image_file, noise, pair, pairs, tar_bytes, write_input

PNG = image_file(noise(0))


def one_shard(folder: Path, files: Files, successes: int | None = None) -> InputShard:
    promised = None if successes is None else {"00000": successes}
    return list_shards(write_input(folder, {"00000": files}, promised))[0]


def outcomes(shard: InputShard) -> list[tuple[str, str | None]]:
    return [(raw.source_key, raw.problem) for raw in shard.samples()]


def test_samples_carry_their_bytes(tmp_path: Path) -> None:
    files = [("5.json", b"{}"), ("5.png", PNG), ("5.txt", b"five"), ("3.png", PNG + b"3"), ("3.json", b"[]")]
    first, second = one_shard(tmp_path, files).samples()
    assert (first.key, first.image, first.text, first.json, first.source) == (
        "5",
        PNG,
        b"five",
        b"{}",
        "00000.tar",
    )
    assert (second.key, second.image, second.text, second.json) == ("3", PNG + b"3", None, b"[]")


def test_what_is_wrong_with_the_files_of_a_sample(tmp_path: Path) -> None:
    files = [
        *pair("good", 1),
        ("late.txt", b"caption first"),
        *pair("between", 2),
        ("late.png", PNG),
        ("two.png", PNG),
        ("two.jpg", PNG),
        ("two.txt", b"x"),
        *pair("good", 3),
        ("bare.png", PNG),
        ("../up.png", PNG),
        ("../up.txt", b"x"),
        ("evil.png", PNG),
        ("evil.pkl", b"cos\nsystem\n"),
        ("movie.gif", b"GIF89a"),
        ("movie.txt", b"x"),
        ("img1.0.png", PNG),
        ("img1.0.txt", b"x"),
        ("img1.5.png", PNG),
        ("img1.5.txt", b"y"),
        ("README", b"hello"),
    ]
    shard = one_shard(tmp_path, files, successes=10)
    assert outcomes(shard) == [
        ("good", None),
        ("late", "orphan"),
        ("between", None),
        ("late", "orphan"),
        ("two", "duplicate_field"),
        ("good", "duplicate_key"),
        ("bare", None),
        ("../up", "bad_key"),
        ("evil", "forbidden_extension"),
        ("movie", "format"),
        ("img1.0", None),
        ("img1.5", None),
        ("README", "orphan"),
    ]
    texts = {raw.source_key: raw.text for raw in shard.samples() if raw.problem is None}
    assert texts["img1.0"] == b"x" and texts["img1.5"] == b"y"


@pytest.mark.parametrize("suffix", ["pyd", "pkl", "pickle", "pth", "pt", "PKL"])
def test_code_is_never_opened(tmp_path: Path, suffix: str) -> None:
    raw = next(iter(one_shard(tmp_path, [*pair("a", 0), (f"a.{suffix}", b"code")]).samples()))
    assert raw.problem == "forbidden_extension"
    assert (raw.image, raw.text, raw.json) == (b"", None, None)


def test_extra_members_are_ignored_and_counted(tmp_path: Path) -> None:
    raw = next(iter(one_shard(tmp_path, [*pair("a", 0), ("a.md5", b"0" * 32), ("a.html", b"<p>")]).samples()))
    assert raw.problem is None and raw.ignored_members == 2


def test_links_are_not_followed(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        entry = tarfile.TarInfo("a.png")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(entry)
        text = tarfile.TarInfo("a.txt")
        text.size = 1
        tar.addfile(text, io.BytesIO(b"x"))
    (tmp_path / "00000.tar").write_bytes(stream.getvalue())
    assert outcomes(list_shards(tmp_path)[0]) == [("a", "member_type")]


def test_oversized_members_stay_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = one_shard(tmp_path, [("a.png", PNG), ("a.txt", b"x" * 100), ("b.png", PNG * 2), ("b.txt", b"x")])
    monkeypatch.setattr(samples, "MAX_TEXT_BYTES", 99)
    monkeypatch.setattr(samples, "MAX_IMAGE_BYTES", len(PNG))
    assert outcomes(shard) == [("a", "caption_too_large"), ("b", "image_too_large")]


def test_only_some_keys(tmp_path: Path) -> None:
    shard = one_shard(tmp_path, pairs(["a", "b", "c"]))
    assert [raw.key for raw in shard.samples(only={"b"})] == ["b"]


def test_a_damaged_tar_says_what_is_lost_and_yields_nothing(tmp_path: Path) -> None:
    shard = one_shard(tmp_path, pairs([f"{k:03d}" for k in range(10)]))
    path = tmp_path / "00000.tar"
    content = bytearray(path.read_bytes())
    header = content.index(b"006.png")
    content[header] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        next(iter(shard.samples()))
    said = str(caught.value)
    assert str(path) in said and f"byte {header}" in said
    assert "10 samples expected, 6 found, 4 lost" in said


def test_every_damage_names_shard_byte_and_the_number_lost(tmp_path: Path) -> None:
    """Cuts and zeroed blocks at every block, flips in every header; the number is counted from tarfile's own index."""
    shard = one_shard(
        tmp_path, [("0.txt", b"x"), ("0.png", b"p" * 700), *pairs([str(k) for k in range(1, 7)])]
    )
    path = tmp_path / "00000.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        members = [(m.offset, m.offset_data + -(-m.size // 512) * 512, m.name) for m in tar.getmembers()]
    last = members[-1][1]

    def whole_pictures(before: int) -> int:
        return sum(end <= before and name.endswith(".png") for _, end, name in members)

    damaged = [(whole[:place], None) for place in range(0, last, 256)]
    damaged += [(whole[:start] + bytes(512) + whole[start + 512 :], start) for start, _, _ in members]
    damaged += [(whole[:start] + bytes(len(whole) - start), None) for start, _, _ in members[1:-1]]
    damaged += [(whole[: start + 5] + b"\xff" + whole[start + 6 :], start) for start, _, _ in members]
    for content, at in damaged:
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            next(iter(shard.samples()))
        said = str(caught.value)
        place = int(re.search(r"at byte (\d+);", said)[1])  # type: ignore[index]
        lost = 7 - whole_pictures(place)
        assert said.startswith(f"{path}: ") and place <= len(content) and (at is None or place == at)
        assert f"7 samples expected, {7 - lost} found, {lost} lost" in said, said
        assert content[:place] == whole[:place], "what stands before the damage is as it was"
    path.write_bytes(whole[: members[-1][0]] + bytes(len(whole) - members[-1][0]))
    *others, final = shard.samples()
    assert len(others) == 6 and final.text is None, (
        "a caption's file zeroed at the very end: the sample is still counted"
    )


def test_without_a_marker_the_loss_is_unknown_not_zero(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes(pairs(["0", "1"]))[:-11000])
    with pytest.raises(DataError, match="how many are lost is not known"):
        next(iter(list_shards(tmp_path)[0].samples()))


@pytest.mark.parametrize(("successes", "said"), [(12, "10 found, 2 lost"), (9, "10 found, 1 too many")])
def test_a_whole_tar_must_hold_what_its_marker_promises(tmp_path: Path, successes: int, said: str) -> None:
    shard = one_shard(tmp_path, pairs([f"{k:03d}" for k in range(10)]), successes=successes)
    with pytest.raises(DataError, match=f"{successes} samples expected, {said}"):
        list(shard.samples())


def test_every_zeroed_page_is_reported_or_rejects_a_sample(tmp_path: Path) -> None:
    """Also where the tar looks as if it ended earlier: the marker knows better."""
    files = pairs([f"{k:03d}" for k in range(6)])
    write_input(tmp_path, {"00000": files})
    path = tmp_path / "00000.tar"
    whole = path.read_bytes()
    pictures = {raw.key: (raw.image, raw.text) for raw in list_shards(tmp_path)[0].samples()}
    silent = 0
    for start in range(0, len(whole), 512):
        if not whole[start : start + 4096].strip(b"\0"):
            continue
        path.write_bytes(whole[:start] + bytes(min(4096, len(whole) - start)) + whole[start + 4096 :])
        try:
            found = {
                raw.key: (raw.image, raw.text)
                for raw in list_shards(tmp_path)[0].samples()
                if not raw.problem
            }
        except DataError as error:
            assert "lost" in str(error)
        else:
            silent += found == pictures
            assert found != pictures  # content was hit: the decoder's business
    assert silent == 0


def test_a_shard_that_img2dataset_did_not_finish_is_refused(tmp_path: Path) -> None:
    write_input(tmp_path, {"00000": pairs(["a"]), "00001": pairs(["b"])})
    (tmp_path / "00001_stats.json").unlink()
    with pytest.raises(DataError, match=r"1 of 2 shards without _stats.json.*00001.tar"):
        list_shards(tmp_path)


def test_the_first_unfinished_shard_is_known_by_its_table(tmp_path: Path) -> None:
    (tmp_path / "00000.tar").write_bytes(tar_bytes(pairs(["a"])))
    assert list_shards(tmp_path)[0].expected is None
    (tmp_path / "00000.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"without _stats\.json"):
        list_shards(tmp_path)


@pytest.mark.parametrize("stats", ["{", "[]", '{"count": 1}', '{"successes": "1"}', '{"successes": -1}'])
def test_a_marker_that_is_none(tmp_path: Path, stats: str) -> None:
    write_input(tmp_path, {"00000": pairs(["a"])})
    (tmp_path / "00000_stats.json").write_text(stats)
    with pytest.raises(DataError, match=r"00000_stats.json"):
        list_shards(tmp_path)


def test_shards_are_sorted_and_identified_by_content(tmp_path: Path) -> None:
    write_input(tmp_path, {"00002": pairs(["c"]), "00000": pairs(["a"]), "00001": pairs(["b"])})
    shards = list_shards(tmp_path)
    assert [shard.stem for shard in shards] == ["00000", "00001", "00002"]
    before, version = shards[0].digest(), shards[0].version()
    assert shards[0].name == "00000.tar" and shards[0].size_bytes() == (tmp_path / "00000.tar").stat().st_size
    os.utime(tmp_path / "00000.tar")
    assert shards[0].digest() == before and shards[0].version() != version
    write_input(tmp_path, {"00000": pairs(["a"], first_seed=9)})
    assert list_shards(tmp_path)[0].digest() != before


@pytest.mark.parametrize(
    "changed",
    [
        {"source_key": "b"},
        {"problem": "orphan"},
        {"image": b"other"},
        {"text": b"other"},
        {"text": None},
        {"json": b""},
        {"text": b"te", "json": b"xt"},
        {"suffix": "png"},
        {"ignored_members": 1},
        {"columns": {"score": 2}},
    ],
    ids=str,
)
def test_the_digest_tells_all_that_is_read(changed: dict[str, Any]) -> None:
    raw = RawSample("a", "a", "00000.tar", None, b"image", b"text", None, "jpg", 0, {"score": 1})
    digests = []
    for sample in (raw, dataclasses.replace(raw), dataclasses.replace(raw, **changed)):
        digest = SamplesDigest()
        digest.add(raw)
        digest.add(sample)
        digests.append(digest.hexdigest())
    assert digests[0] == digests[1] != digests[2]


def test_names_that_cannot_be_an_output_are_refused(tmp_path: Path) -> None:
    write_input(tmp_path, {"a b": pairs(["a"])})
    with pytest.raises(DataError, match="rename a b"):
        list_shards(tmp_path)


def write_folder(folder: Path, files: Files) -> Path:
    for name, content in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_a_folder_of_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SHARD_IMAGES", 2)
    files = [*pair("b", 1), *pair("a", 2), *pair("sub folder/c", 3), ("lonely.txt", b"x"), ("d.PNG", PNG)]
    shards = list_shards(write_folder(tmp_path, files))
    assert [shard.stem for shard in shards] == ["00000", "00001", "00002"]
    assert [outcomes(shard) for shard in shards] == [
        [("a", None), ("b", None)],
        [("d", None), ("lonely", "orphan")],
        [("sub folder/c", None)],
    ]
    raw = next(iter(shards[0].samples()))
    assert raw.text == b"picture number 2" and raw.source == "a.png" and raw.image == image_file(noise(2))
    before = shards[2].digest(), shards[2].version()
    (tmp_path / "sub folder/c.txt").write_bytes(b"another caption!")
    again = list_shards(tmp_path)[2]
    assert again.digest() != before[0] and again.version() != before[1]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([("notes.md", b"x")], "no tars, no parquet shards and no pictures"),
        ([], "no tars, no parquet shards and no pictures"),
        ([("a.png", PNG), ("b.tar", b"")], "both tars and pictures"),
        ([("sub/00000.tar", b"")], "give the folder that holds the tars itself"),
    ],
)
def test_folders_that_would_lose_something(tmp_path: Path, files: Files, said: str) -> None:
    with pytest.raises(DataError, match=said):
        list_shards(write_folder(tmp_path, files))


def test_linked_folders_and_missing_ones(tmp_path: Path) -> None:
    write_folder(tmp_path / "real", pair("a", 0))
    (tmp_path / "source").mkdir()
    (tmp_path / "source/link").symlink_to(tmp_path / "real")
    with pytest.raises(DataError, match="a link to a folder"):
        list_shards(tmp_path / "source")
    with pytest.raises(DataError, match="not a folder"):
        list_shards(tmp_path / "nowhere")


def test_stats_of_the_example_data_are_kept(tmp_path: Path) -> None:
    examples = Path(__file__).parents[2] / "examples/emoji"
    shards = list_shards(examples)
    promised = [json.loads(path.read_text())["successes"] for path in sorted(examples.glob("*_stats.json"))]
    assert [shard.expected for shard in shards] == promised
    assert [sum(raw.problem is None for raw in shard.samples()) for shard in shards] == promised
