"""A real S3 server on loopback: the storage layer, and input shards read from `s3://`."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.errors import DataError
from preprocessing.finalize import finalize_dataset
from preprocessing.refusals import OtherFingerprintError
from preprocessing.report import compare
from preprocessing.roster import Work, encode_shards
from preprocessing.sources import list_shards
from preprocessing.verify import verify_dataset
from tests.builders import tiny_config
from tests.pipeline.test_storage import CONTENT, check_layer
from tests.preprocessing.builders import NumpyEncoder, encode_one, pairs, three_shards
from tests.preprocessing.torch_stubs import StubAutoencoder, StubTextEncoder

pytestmark = pytest.mark.services
RECORDED = Path(__file__).parents[1] / "preprocessing/recorded"
KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    """A real S3 server (moto's) on loopback; its address and keys are in the environment, as for any client."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    endpoint = f"http://127.0.0.1:{port}"
    given = {"AWS_ENDPOINT_URL": endpoint, **KEYS}
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    storage._system.cache_clear()
    storage.fsspec.get_filesystem_class("s3").clear_instance_cache()
    try:
        _wait_for(endpoint, server)
        yield endpoint
    finally:
        storage._system.cache_clear()
        server.send_signal(signal.SIGTERM)
        server.wait(20)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _wait_for(endpoint: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while True:
        assert server.poll() is None, "the S3 server ended"
        try:
            with urllib.request.urlopen(f"{endpoint}/moto-api/", timeout=5):
                return
        except OSError:
            assert time.monotonic() < deadline, "the S3 server does not answer"
            time.sleep(0.2)


def upload(bucket: str, files: dict[str, bytes]) -> str:
    """Make a bucket with the files and return its URL."""
    system, _ = storage._open_system(f"s3://{bucket}")
    system.mkdir(bucket)
    for name, content in files.items():
        system.pipe_file(f"{bucket}/data/{name}", content)
    return f"s3://{bucket}/data"


def test_a_real_s3_server(s3_server: str) -> None:
    root = upload("layer", CONTENT)
    check_layer(root)
    place = storage.join(root, "a.txt")
    before = storage.stat_file(place)
    system, _ = storage._open_system(place)
    system.pipe_file("layer/data/a.txt", b"fiRst")
    assert storage.stat_file(place).version != before.version


def upload_folder(bucket: str, folder: Path) -> str:
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    return upload(bucket, files)


def test_shards_in_a_store_give_the_same_bytes(s3_server: str, tmp_path: Path) -> None:
    """Tars, parquet shards and picture folders: what comes out is that of the same input on a disk."""
    source = three_shards(tmp_path / "tars")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name, content in pairs(["a", "b", "c"]):
        (pictures / name).write_bytes(content)
    for number, folder in enumerate((source, pictures, RECORDED / "parquet", RECORDED / "jpg")):
        root = upload_folder(f"same-{number}", folder)
        for local, remote in zip(list_shards(folder), list_shards(root), strict=True):
            here = encode_one(local, tmp_path / f"here{number}")
            there = encode_one(remote, tmp_path / f"there{number}")
            assert (here.tar_digest, here.counts) == (there.tar_digest, there.counts)
            assert here.counts.written > 0 and local.size_bytes() == remote.size_bytes()


def test_a_data_set_from_a_store(s3_server: str, tmp_path: Path) -> None:
    """Encode, finalize, verify and the report's comparison with `s3://` as the source: all but the input's name is local's."""
    local = three_shards(tmp_path / "in")
    root = upload_folder("whole", local)
    compared, manifests = [], []
    for source in (str(local), root):
        out = tmp_path / source.partition(":")[0].rpartition("/")[2]
        encode = {"source": source, "image_size": 16, "batch": 4, "validation_samples": 4}
        config = tiny_config(tmp_path / "runs", encode=encode)
        done = encode_shards(Work(list_shards(source, config.encode), out), NumpyEncoder(), config.encode)
        assert (done.encoded, done.counts.read, done.counts.written) == (3, 18, 18)
        manifests.append(finalize_dataset(config, out, source, text_encoder=StubTextEncoder()))
        assert verify_dataset(out, samples=None, decode_with=None).problems == []
        decoder = StubAutoencoder(manifests[-1].encoder["autoencoder"])
        compared.append([(c.key, c.psnr) for c in compare(out, source, decoder)])
    assert compared[0] == compared[1] and len(compared[0]) == 16
    assert manifests[0].digest == manifests[1].digest, "the same data set, wherever its input lay"
    assert encode_shards(Work(list_shards(root), out), NumpyEncoder(), config.encode).finished_before == 3
    system, _ = storage._open_system(root)
    changed = (local / "00001.tar").read_bytes().replace(b"picture number", b"Picture number")
    system.pipe_file("whole/data/00001.tar", changed)
    with pytest.raises(OtherFingerprintError, match=r"00001\.json: .*input\.sha256"):
        encode_shards(Work(list_shards(root), out), NumpyEncoder(), config.encode)


def test_an_object_that_was_replaced_is_another_input(s3_server: str, tmp_path: Path) -> None:
    source = three_shards(tmp_path)
    root = upload_folder("replaced", source)
    before = list_shards(root)[1].version()
    assert before == list_shards(root)[1].version() and list_shards(root)[1].name == "00001.tar"
    system, _ = storage._open_system(root)
    system.pipe_file("replaced/data/00001.tar", (source / "00001.tar").read_bytes()[:-1] + b"\1")
    assert list_shards(root)[1].version() != before
    with pytest.raises(DataError, match=r"s3://replaced/data/00001.tar: .*5 samples expected"):
        list(list_shards(root)[1].samples())


def test_a_store_that_stumbles_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Stumbling(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers["Range"])
            body = b"" if len(asked) < 3 else b"cdef"
            self.send_response(503 if len(asked) < 3 else 206)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Range", "bytes 2-5/10")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Stumbling)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}.items():
        monkeypatch.setenv(name, value)
    storage._system.cache_clear()
    storage.fsspec.get_filesystem_class("s3").clear_instance_cache()
    try:
        assert storage.read_range("s3://bucket/object", 2, 4) == b"cdef"
        assert asked == ["bytes=2-5"] * 3
    finally:
        storage._system.cache_clear()
        storage.fsspec.get_filesystem_class("s3").clear_instance_cache()
        server.shutdown()
        server.server_close()
