"""The report in a real browser: every picture is painted, every number is the manifest's, nothing is fetched."""

from pathlib import Path

import pytest

from pipeline.latents.manifest import Manifest
from preprocessing.report import compare, render_report
from tests.preprocessing.builders import pair, write_input
from tests.preprocessing.conftest import Prepared
from tests.preprocessing.torch_stubs import StubAutoencoder
from tests.services.browser import browser_page

pytestmark = pytest.mark.services
CELLS = (
    "[...document.querySelectorAll('section:first-of-type tr')].map(r => [...r.cells].map(c => c.innerText))"
)


def test_the_page_as_a_browser_shows_it(tmp_path: Path) -> None:
    prepared = Prepared(tmp_path)
    caption = "<script>document.title = 'owned'</script> & <img src=x>"
    files = [file for k in range(9) for file in pair(f"k{k}", k, caption)]
    write_input(prepared.source, {"00000": [*files, ("x.png", b""), ("x.txt", b"x")]})
    prepared.encode()
    prepared.finalize()
    manifest = Manifest.load(prepared.out)
    decoder = StubAutoencoder(manifest.encoder["autoencoder"])
    path = render_report(prepared.out, prepared.source, decoder)
    shown = compare(prepared.out, prepared.source, decoder)
    with browser_page(tmp_path / "profile") as page:
        page.open(path.as_uri())
        widths = page.evaluate("[...document.images].map(i => i.complete ? i.naturalWidth : -1)")
        assert len(widths) == 2 * len(shown) == 18 and set(widths) == {16}
        counts = {row[0]: row[1] for row in page.evaluate(CELLS) if row}
        assert counts["read"] == str(manifest.counts.read) == "10"
        assert counts["written"] == str(manifest.counts.written) == "9"
        assert counts["rejected: empty"] == "1" and counts["unaccounted"] == "0"
        assert page.evaluate("document.title") == f"{prepared.out.name}: data set report"
        captions = page.evaluate(
            "[...document.querySelectorAll('.gallery figcaption')].map(f => f.innerText)"
        )
        assert len(captions) == len(shown) and all(caption in text for text in captions)
        decibels = [float(text.split(" dB")[0]) for text in captions]
        assert decibels == sorted(decibels), "the worst come first"
        bars = "[...document.querySelectorAll('svg rect')].every(r => r.getBoundingClientRect().width > 0)"
        assert page.evaluate(bars)
        outside = [
            address for address in page.requests if not address.startswith(("data:", "file:", "about:"))
        ]
        assert outside == [] and page.complaints == []
