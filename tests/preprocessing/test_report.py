"""The report is one static page whose numbers and pictures are those of the data set."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import DataError
from pipeline.latents.manifest import Manifest
from preprocessing.report import compare, render_report, used_tokens, write_report
from tests.builders import tiny_autoencoder
from tests.preprocessing.builders import NumpyEncoder, pair, write_input
from tests.preprocessing.conftest import Prepared
from tests.preprocessing.torch_stubs import StubAutoencoder


def decoder(prepared: Prepared) -> StubAutoencoder:
    return StubAutoencoder(Manifest.load(prepared.out).encoder["autoencoder"])


class Page(HTMLParser):
    """Collects what would reach out of the page, and whether every tag is closed."""

    VOID = frozenset({"meta", "img", "br", "rect"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [
            value or "" for name, value in attrs if name in ("src", "href", "data", "action", "srcset")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_one_static_page_without_network(prepared: Prepared) -> None:
    path = render_report(prepared.out, prepared.source, decoder(prepared))
    assert path == prepared.out / "report.html"
    text = path.read_text()
    page = Page(text)
    assert page.open == [] and page.sources
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not set(page.tags) & {"script", "link", "iframe", "object", "form"}
    assert "http" not in text.replace("http-equiv", "")
    assert "default-src 'none'" in text
    said = " ".join(page.text)
    for expected in ("18", "truncated_caption", "train 14, validation 4", Manifest.load(prepared.out).digest):
        assert expected in said


def test_shards_that_the_job_left_out_do_not_stop_the_comparison(prepared: Prepared) -> None:
    """A source that was encoded with `unfinished_shards: leave_out` has tars without a marker beside the rest."""
    unfinished = Path(prepared.source) / "00099.tar"
    unfinished.write_bytes(b"")
    try:
        assert len(compare(prepared.out, prepared.source, decoder(prepared))) == 16
    finally:
        unfinished.unlink()


def test_pictures_are_the_originals_and_the_decoded_latents(prepared: Prepared) -> None:
    text = render_report(prepared.out, prepared.source, decoder(prepared)).read_text()
    comparisons = compare(prepared.out, prepared.source, decoder(prepared))
    assert {c.split for c in comparisons} == {"train", "validation"} and len(comparisons) == 16
    shown = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        for data in re.findall(r"src='data:image/png;base64,([^']+)'", text)
    ]
    expected = [picture for c in comparisons for picture in (c.original, c.decoded)]
    assert len(shown) == len(expected)
    assert all(np.array_equal(a, b) for a, b in zip(shown, expected, strict=True))
    for c in comparisons:
        painted = NumpyEncoder().moments(c.original)[:3].repeat(4, 1).repeat(4, 2).transpose(1, 2, 0)
        assert np.abs((painted + 1) * 127.5 - c.decoded).max() <= 1
        error = np.mean((c.original.astype(float) - c.decoded) ** 2)
        assert np.isclose(c.psnr, 20 * np.log10(255) - 10 * np.log10(error))
    assert [c.psnr for c in comparisons] == sorted(c.psnr for c in comparisons)


def test_captions_from_the_data_are_only_text(tmp_path: Path) -> None:
    prepared = Prepared(tmp_path)
    evil = "<script>alert(1)</script>\"'&<img src=http://x>"
    files = [file for k in range(8) for file in pair(f"k{k}", k, evil)]
    write_input(prepared.source, {"00000": [*files, ("<b>.png", b""), ("<b>.txt", b"x")]})
    prepared.encode()
    prepared.finalize()
    page = Page(render_report(prepared.out, prepared.source, decoder(prepared)).read_text())
    assert "script" not in page.tags and "b" in page.tags
    assert all(source.startswith("data:") for source in page.sources)
    said = " ".join(page.text)
    assert "<script>alert(1)</script>" in said and "rejected: empty" in said and "for instance <b>" in said


def test_other_encoders_and_other_sources_are_refused(prepared: Prepared) -> None:
    with pytest.raises(DataError, match="encoded with autoencoder"):
        render_report(prepared.out, prepared.source, StubAutoencoder("other"))
    with pytest.raises(DataError, match="encoded with autoencoder"):
        write_report(prepared.out, prepared.source, tiny_autoencoder(prepared.root / "autoencoder"))
    write_input(
        prepared.source, {"00000": [file for k in range(7) for file in pair(f"00000{k:03d}", 50 + k)]}
    )
    with pytest.raises(DataError, match="is another picture"):
        render_report(prepared.out, prepared.source, decoder(prepared))


def test_tokens_before_the_padding() -> None:
    assert used_tokens(np.array([1, 5, 6, 2, 2, 2])) == 3
    assert used_tokens(np.array([1, 5, 6, 2, 0, 0])) == 4
    assert used_tokens(np.array([1, 5, 6, 7, 8, 2])) == 5
    assert used_tokens(np.array([2, 2])) == 0
