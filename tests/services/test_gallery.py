"""The gallery's page in a real browser: every sheet is painted, nothing is fetched, nothing in it runs."""

from pathlib import Path

import pytest

from pipeline.gallery.sheet import Sheet, Strip, Tile, gallery_page
from tests.builders import tiny_pictures
from tests.services.browser import browser_page

pytestmark = pytest.mark.services


def test_the_page_as_a_browser_shows_it(tmp_path: Path) -> None:
    pictures = tiny_pictures(2, side=64)
    prompt = "<script>document.title = 'owned'</script>"
    sheets = [
        Sheet(name, f"{name} & more", "scales < 3", [Strip(prompt, [Tile(part, "t 1") for part in pictures])])
        for name in ("guidance", "attention")
    ]
    path = tmp_path / "index.html"
    path.write_text(gallery_page("a <run>", "ema & raw", sheets))
    with browser_page(tmp_path / "profile") as page:
        page.open(path.as_uri())
        assert page.evaluate("document.title") == "a <run>: gallery"
        sizes = page.evaluate("[...document.images].map(i => i.complete ? i.naturalWidth : -1)")
        assert sizes == [2 * (128 + 8) + 8] * 2
        titles = page.evaluate("[...document.querySelectorAll('h2')].map(h => h.innerText)")
        assert titles == ["guidance & more", "attention & more"]
        said = page.evaluate("[...document.querySelectorAll('p')].map(p => p.innerText)")
        assert said == ["ema & raw", "scales < 3", "scales < 3"]
        outside = [url for url in page.requests if not url.startswith(("data:", "file:", "about:"))]
        assert outside == [] and page.complaints == []
