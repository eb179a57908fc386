"""Files here and in fsspec's memory store through one layer; the real S3 server is in tests/services."""

import hashlib
import io
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from botocore.exceptions import EndpointConnectionError, NoCredentialsError

from pipeline import storage
from pipeline.errors import ConfigError

CONTENT = {"b.bin": bytes(range(256)) * 40, "a.txt": b"first", "sub/c.txt": b"below"}


@pytest.fixture
def local(tmp_path: Path) -> str:
    for name, content in CONTENT.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return str(tmp_path)


@pytest.fixture
def memory() -> str:
    root = f"memory://{uuid.uuid4().hex}"
    system, _ = storage._open_system(root)
    for name, content in CONTENT.items():
        system.pipe_file(f"{root}/{name}", content)
    return root


def check_layer(root: str) -> None:
    """Hold every function against what was written."""
    assert storage.is_folder(root) and not storage.is_folder(f"{root}/nowhere")
    assert [(file.name, file.size_bytes) for file in storage.list_files(root)] == [
        ("a.txt", 5),
        ("b.bin", 10240),
    ]
    assert [file.name for file in storage.list_files(root, below=True)] == ["a.txt", "b.bin", "sub/c.txt"]
    place = storage.join(root, "b.bin")
    assert storage.exists(place) and not storage.exists(f"{root}/no") and not storage.exists(f"{root}/sub")
    assert storage.stat_file(place).size_bytes == 10240 and storage.stat_file(place).version
    assert storage.read_file(place) == CONTENT["b.bin"]
    assert storage.read_range(place, 255, 3) == b"\xff\x00\x01"
    assert storage.read_range(place, 10238, 10) == b"\xfe\xff" and storage.read_range(place, 5, 0) == b""
    with storage.open_file(place) as stream:
        stream.seek(300)
        assert stream.read(4) == CONTENT["b.bin"][300:304]
    copy = io.BytesIO()
    assert storage.fetch(place, copy) == hashlib.sha256(CONTENT["b.bin"]).hexdigest()
    assert copy.getvalue() == CONTENT["b.bin"]
    with pytest.raises(FileNotFoundError):
        storage.stat_file(f"{root}/no")
    with pytest.raises(FileNotFoundError):
        storage.list_files(f"{root}/nowhere")


def test_local_paths_and_file_urls(local: str) -> None:
    check_layer(local)
    check_layer(f"file://{local}")
    assert (
        not storage.is_remote(local)
        and not storage.is_remote(f"file://{local}")
        and storage.is_remote("s3://b")
    )


def test_a_store(memory: str) -> None:
    check_layer(memory)


def test_the_version_follows_the_content(local: str) -> None:
    place = storage.join(local, "a.txt")
    before = storage.stat_file(place)
    assert storage.list_files(local)[0] == before
    Path(place).write_bytes(b"first!")
    assert storage.stat_file(place).version != before.version


@pytest.mark.parametrize("place", ["http://host/x", "gs://bucket/x", "ftp://x/y"])
def test_other_protocols_are_refused(place: str) -> None:
    with pytest.raises(ConfigError, match=r"not supported; give a local path or one of file://, s3://"):
        storage.list_files(place)


def test_a_fetch_that_comes_short_is_no_file(local: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = storage.join(local, "b.bin")
    monkeypatch.setattr(storage, "open_file", lambda where: io.BytesIO(b"short"))
    with pytest.raises(OSError, match=r"5 bytes came, the store lists 10240"):
        storage.fetch(place, io.BytesIO())


class GoneStore:
    """A store whose client has given up, in the client's own words."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def _strip_protocol(self, place: str) -> str:
        return place.removeprefix("s3://")

    def __getattr__(self, name: str) -> Callable[..., None]:
        def give_up(*_: object, **__: object) -> None:
            raise self._error

        return give_up


@pytest.mark.parametrize(
    "call",
    [storage.is_folder, storage.exists, storage.open_file, storage.read_file],
)
def test_what_the_client_raises_is_an_os_error_or_the_users_mistake(
    call: Callable[[str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = EndpointConnectionError(endpoint_url="http://localhost:1")
    monkeypatch.setattr(storage, "_system", lambda protocol: GoneStore(gone))
    with pytest.raises(OSError, match=r"s3://bucket/x: EndpointConnectionError: Could not connect"):
        call("s3://bucket/x")
    monkeypatch.setattr(storage, "_system", lambda protocol: GoneStore(NoCredentialsError()))
    with pytest.raises(ConfigError, match=r"s3://bucket/x: Unable to locate credentials; give the store's"):
        call("s3://bucket/x")
