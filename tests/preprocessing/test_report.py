"""The report is one static page whose numbers and pictures are those of the data set."""

import base64
import html
import io
import re
import tarfile
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.errors import DataError
from pipeline.latents.manifest import Manifest
from pipeline.latents.reader import LatentDataset
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


def section(text: str, title: str) -> str:
    """Return the HTML of one section of the page."""
    (found,) = [part for part in text.split("<section>") if f"<h2>{title}</h2>" in part]
    return found


def rows_in(part: str) -> list[list[str]]:
    """Return the cells of every row of a section's tables."""
    lines = [re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", part)]
    return [[html.unescape(cell) for cell in line] for line in lines]


def drawn(part: str) -> dict[str, str]:
    """Return what is written below each drawing, by title, having seen that its highest bar is as high as can be."""
    found = {}
    for chart in part.split("<figure class='chart'>")[1:]:
        heights = [float(height) for height in re.findall(r"height='([\d.]+)'", chart)]
        assert max(heights) == 86.0
        title, said = re.search(r"<b>(.*?)</b><br>(.*?)</figcaption>", chart).groups()  # type: ignore[union-attr]
        found[html.unescape(title)] = html.unescape(said)
    return found


def stated(values: Sequence[float]) -> str:
    return f"{min(values):.4g} to {max(values):.4g}, median {np.median(values):.4g}, {len(values)} values"


def test_every_figure_of_the_page_is_that_of_the_data_set(prepared: Prepared) -> None:
    """Held against the rows, the stored arrays and the files' own sizes, each read here by itself."""
    text = render_report(prepared.out, prepared.source, decoder(prepared)).read_text()
    train = LatentDataset(prepared.out)
    stored = [train.read(index) for index in range(len(train))]
    rows = [
        row
        for path in sorted(prepared.out.glob("*/*.parquet"))
        for row in pq.read_table(path).to_pylist()
        if row["status"] == "written"
    ]
    pictures = drawn(section(text, "Captions and pictures"))
    tokens = [
        int((sample.arrays["tokens"][0] != 2).sum()) for sample in stored
    ]  # 2 is what `tokens` pads with
    assert pictures["tokens before the padding, of 6"] == stated(tokens)
    assert pictures["characters of a caption"] == stated([len(row["captions"][0]) for row in rows])
    assert pictures["shorter side of the original, pixels"] == stated([20] * 18)
    assert pictures["width over height of the original"] == stated([1.0] * 18)
    assert rows_in(section(text, "Buckets"))[1][:3] == ["16 x 16", "14", "4"]
    latents = section(text, "Latents")
    for channel in range(3):
        values = np.concatenate([sample.arrays["latent"][channel].ravel() for sample in stored]).astype(
            np.float32
        )
        assert drawn(latents)[f"channel {channel}, posterior mean"] == stated(values)
    members = rows_in(section(text, "Storage"))[1:]
    sizes = {line[0]: int(line[1].replace(",", "")) for line in members}
    with tarfile.open(next(prepared.out.glob("*/*.tar"))) as tar:
        entries = {m.name.split(".")[1]: 512 + -(-m.size // 512) * 512 for m in tar.getmembers()}
    assert sizes == {f"16 x 16 {name}": size for name, size in entries.items()}
    assert sum(float(line[3].removesuffix(" %")) for line in members) == pytest.approx(100, abs=0.3)
    whole = sum(path.stat().st_size for path in prepared.out.glob("*/*.tar"))
    assert f"{whole / 1e6:,.1f} MB in 3 tars" in section(text, "Storage")


def test_reasons_stand_with_counts_and_examples(tmp_path: Path) -> None:
    prepared = Prepared(tmp_path)
    bad = [file for k in range(5) for file in [(f"bad{k}.png", b""), (f"bad{k}.txt", b"x")]]
    files = [*[file for k in range(8) for file in pair(f"k{k}", k)], *bad, ("lone.txt", b"x")]
    write_input(prepared.source, {"00000": files})
    prepared.encode()
    prepared.finalize()
    text = render_report(prepared.out, prepared.source, decoder(prepared)).read_text()
    lines = {line[0]: line[1:] for line in rows_in(section(text, "What became of the input")) if line}
    assert lines["read"][0] == "14" and lines["written"][0] == "8" and lines["unaccounted"][0] == "0"
    assert lines["rejected: empty"] == ["5", "for instance bad0, bad1, bad2"]
    assert lines["rejected: orphan"] == ["1", "for instance lone"]
