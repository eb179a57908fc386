"""Our tar bytes are those of webdataset's own writer and of `tarfile`."""

import io

import pytest
from webdataset.writer import TarWriter

from pipeline.latents.record import TAR_BLOCK
from preprocessing.tar_blocks import padding, tar_end, tar_header


def ours(files: list[tuple[str, bytes]]) -> bytes:
    content = b"".join(tar_header(name, len(body)) + body + padding(len(body)) for name, body in files)
    return content + tar_end(len(content))


def theirs(files: list[tuple[str, bytes]]) -> bytes:
    stream = io.BytesIO()
    with TarWriter(stream, encoder=False, mtime=0) as tar:
        for name, body in files:
            key, _, suffix = name.partition(".")
            tar.write({"__key__": key, suffix: body})
    return stream.getvalue()


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 65664])
@pytest.mark.parametrize("key", ["a", "~" * 80, "0-_" * 26])
def test_bytes_are_those_of_the_stock_writer(key: str, size: int) -> None:
    files = [(f"{key}.latent.npy", bytes(range(256)) * (size // 256 + 1)), (f"{key}.json", b"{}" * 128)]
    files[0] = (files[0][0], files[0][1][:size])
    assert ours(files) == theirs(files)


@pytest.mark.parametrize("members", [0, 1, 17, 18, 19, 20, 40])
def test_the_end_fills_a_record_as_the_stock_writer_does(members: int) -> None:
    files = [(f"k{number}.json", b"x" * TAR_BLOCK) for number in range(members)]
    assert ours(files) == theirs(files)


def test_a_long_name_is_no_header() -> None:
    with pytest.raises(AssertionError):
        tar_header("k" * 101, 1)
