"""The writer: the file is the format's, one piece of work at a time, and it can be broken off."""

import threading
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from pipeline.errors import PipelineError
from pipeline.training.saving import writer as writer_module
from pipeline.training.saving.writer import Writer, explain_os_error, write_file


def test_stock_safetensors_reads_what_is_written_in_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "CHUNK_BYTES", 7)
    tensors = {"a/0": memoryview(bytes(range(40))), "b/3": memoryview(b"\0\0\x80\x3f")}
    record = write_file(tmp_path / "f", tensors)
    loaded = load_file(tmp_path / "f")
    assert loaded["b/3"].tolist() == [1.0] and loaded["a/0"].tobytes() == bytes(range(40))
    assert record["bytes"] == (tmp_path / "f").stat().st_size


def test_writing_is_broken_off_between_two_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()
    monkeypatch.setattr(writer_module, "CHUNK_BYTES", 8)
    monkeypatch.setattr(writer_module, "put", lambda stream, chunk: stop.set())
    with pytest.raises(PipelineError, match="broken off"):
        write_file(tmp_path / "f", {"a": memoryview(bytes(64))}, stop)


def test_one_work_at_a_time_and_its_error_comes_with_its_result() -> None:
    writer, gate = Writer(), threading.Event()
    writer.begin(gate.wait)
    assert writer.busy
    with pytest.raises(AssertionError, match="one save in flight"):
        writer.begin(gate.wait)
    gate.set()
    writer.wait()
    assert not writer.busy and writer.take() is True

    def fails() -> None:
        raise ValueError("broken")

    writer.begin(fails)
    writer.wait()
    with pytest.raises(ValueError, match="broken"):
        writer.take()
    writer.close()


def test_closing_does_not_wait_for_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer()
    monkeypatch.setattr(writer_module, "CHUNK_BYTES", 64)
    monkeypatch.setattr(writer_module, "put", lambda stream, chunk: time.sleep(0.02))
    writer.begin(lambda: write_file(tmp_path / "f", {"a": memoryview(bytes(640_000))}, writer.stop))
    began = time.monotonic()
    writer.close()
    assert time.monotonic() - began < 20  # 200 s of writing are left.


def test_a_full_disk_is_told_with_what_is_free(tmp_path: Path) -> None:
    said = explain_os_error(OSError(28, "No space left on device", str(tmp_path / "f")), tmp_path)
    assert said.startswith(f"No space left on device: {tmp_path / 'f'} (") and "bytes and" in said
