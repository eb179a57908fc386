"""The page of `ldm compare` in a real browser: every picture is painted, numbers are the runs' own, nothing is fetched."""

import json
from pathlib import Path

import pytest

from launch.compare.page import render
from launch.compare.runs import compared_runs
from tests.launch.test_compare import write_run
from tests.services.browser import browser_page

pytestmark = pytest.mark.services
CELLS = "[...document.querySelectorAll('tr')].map(r => [...r.cells].map(c => c.innerText))"
CAPTIONS = "[...document.querySelectorAll('.chart figcaption')].map(f => f.innerText)"


def test_the_page_as_a_browser_shows_it(tmp_path: Path) -> None:
    nasty = "<script>document.title = 'owned'<@script>".replace("@", "\u2215")
    one = write_run(tmp_path / "one", losses=[4.0, 2.0], grids=(1, 2), train={"steps": 7})
    two = write_run(tmp_path / nasty, losses=[3.0, 1.0, 0.5], grids=(3,), train={"steps": 9})
    (one / "evaluation.json").write_text(json.dumps({"ema": {"loss": 0.125}}))
    path = tmp_path / "compare.html"
    path.write_text(render(compared_runs([one, two])))
    with browser_page(tmp_path / "profile") as page:
        page.open(path.as_uri())
        assert page.evaluate("document.title") == f"one and {nasty}: compared"
        widths = page.evaluate("[...document.images].map(i => i.complete ? i.naturalWidth : -1)")
        assert widths == [6] * 4, "the newest of both, and the strip of the one with two"
        cells = {row[0]: row[1:] for row in page.evaluate(CELLS) if row}
        assert cells["train.steps"] == ["7", "9"] and cells["ema.loss"] == ["0.125", "\N{EM DASH}"]
        assert page.evaluate(CAPTIONS)[0] == "train: loss by step\n0.5 to 4; step 1 to 3"
        lines = "[...document.querySelectorAll('polyline')].map(l => l.getBoundingClientRect().width > 0)"
        assert page.evaluate(lines) == [True] * 4
        colours = "[...document.querySelectorAll('svg:first-of-type polyline')].map(l => getComputedStyle(l).stroke)"
        assert len(set(page.evaluate(colours))) == 2
        outside = [
            address for address in page.requests if not address.startswith(("data:", "file:", "about:"))
        ]
        assert outside == [] and page.complaints == []
