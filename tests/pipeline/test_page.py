"""The parts of a page: what they draw, and that every word is escaped."""

import re

import pytest

from pipeline.page import COLOURS, curves, histogram, legend, picture, render_page, sections, table

NASTY = "<script>x</script> & '\""


def test_histograms_show_every_value() -> None:
    drawing = histogram([1, 1, 1, 3], "title <x>")
    heights = [float(height) for height in re.findall(r"height='([\d.]+)'", drawing)]
    assert heights == [86.0, 0.0, 28.7]
    assert "title &lt;x&gt;" in drawing and "1 to 3, median 1, 4 values" in drawing
    assert histogram([], "nothing") == ""
    assert "median 0.5" in histogram([0.5], "one")


def points(drawing: str) -> list[list[tuple[float, float]]]:
    return [
        [tuple(map(float, pair.split(","))) for pair in line.split()]  # type: ignore[misc]
        for line in re.findall(r"points='([^']*)'", drawing)
    ]


def test_curves_share_one_scale_and_keep_their_colours() -> None:
    drawing = curves({"a": ([0, 10], [1.0, 3.0]), "none": ([], []), "b": ([5], [2.0])}, "loss", "step")
    assert points(drawing) == [[(0.0, 90.0), (320.0, 4.0)]]
    assert f"<circle cx='160.0' cy='47.0' r='3' fill='{COLOURS[2]}'/>" in drawing, "one point is a dot"
    assert re.findall("stroke='([^']*)'", drawing) == [COLOURS[0]]
    assert "1 to 3; step 0 to 10" in drawing
    names = legend(["a", "none", "b"])
    assert [names.index(colour) for colour in COLOURS[:3]] == sorted(names.index(c) for c in COLOURS[:3])


def test_what_is_not_finite_is_left_out_and_nothing_is_no_drawing() -> None:
    nan = float("nan")
    (line,) = points(curves({"a": ([1, 2, 3, nan], [1.0, nan, 2.0, 5.0])}, "t", "step"))
    assert line == [(0.0, 90.0), (320.0, 4.0)]
    assert curves({"a": ([1], [nan])}, "t", "step") == "" == curves({}, "t", "step")
    assert points(curves({"a": ([1, 2], [7.0, 7.0])}, "t", "step")) == [[(0.0, 90.0), (320.0, 90.0)]], (
        "one value"
    )


@pytest.mark.parametrize(
    "made",
    [
        table([NASTY], [[NASTY]]),
        histogram([1, 2], NASTY),
        curves({NASTY: ([0, 1], [0.0, 1.0])}, NASTY, NASTY),
        legend([NASTY]),
        picture(b"", NASTY),
        sections([(NASTY, "<p>x</p>")]),
        render_page(NASTY, "", about=NASTY),
    ],
)
def test_no_word_becomes_markup(made: str) -> None:
    assert "<script" not in made and "&lt;script&gt;" in made


def test_a_part_without_content_has_no_title() -> None:
    assert sections([("empty", ""), ("full", "<p>x</p>")]) == "<section><h2>full</h2><p>x</p></section>"
    assert "<th>" not in table(("", ""), [("a", "b")])
