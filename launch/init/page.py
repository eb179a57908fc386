"""The one-page report: what the source holds, what is proposed and why. One static file, no scripts, no network."""

import html
from collections.abc import Iterator, Sequence

from launch.init.cost import MEASURED_ON, VISITS, visits_words
from launch.init.look import Example, Facts
from launch.init.proposal import Proposal
from pipeline.page import histogram, picture, render_page, sections, table
from preprocessing.filters import Rules
from preprocessing.images import Picture, png_bytes, prepare_image
from preprocessing.reasons import REASONS

SHOWN_PIXELS = 96
LONG_CAPTION = 160


def render(facts: Facts, proposal: Proposal, command: str) -> str:
    """Return the page as HTML; `command` is what runs the proposal."""
    parts = [
        ("Before you start", _notes(proposal.notes)),
        ("What it will take", _costs(proposal)),
        ("What is proposed, and why", _choices(proposal)),
        ("What the source holds", _counts(facts)),
        ("Pictures", _pictures(facts)),
        ("Captions", _captions(facts)),
        ("As they would be prepared", _gallery(facts.examples, proposal)),
    ]
    lead = f"<p>To run it: <code>{html.escape(command)}</code></p>"
    return render_page(proposal.config.name, sections(parts), about="what init found", lead=lead)


def _notes(notes: Sequence[str]) -> str:
    said = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return f"<ul>{said}</ul>" if notes else "<p>Nothing stands in the way.</p>"


def _costs(proposal: Proposal) -> str:
    gpu = proposal.gpu
    if gpu is not None:
        return table(
            ("", f"{gpu.device}-hours, estimated"),
            [("encoding", f"{gpu.encode_hours:,.2f}"), ("training", f"{gpu.train_hours:,.1f}")],
        ) + (
            f"<p>{proposal.visits:,.1f} visits of each picture on {gpu.devices} devices of {gpu.memory_gib:.0f} GiB in use. "
            "An estimate from arithmetic and published speeds, measured on no GPU here; <code>ldm plan</code> says more.</p>"
        )
    lines = [(cost.stage, f"{cost.seconds / 60:.1f}", cost.words) for cost in proposal.stages]
    measured = "; ".join(f"{loss:g} at {visits}" for visits, loss in VISITS)
    return table(("stage", "minutes", ""), [*lines, ("in all", f"{proposal.minutes:.0f}", "")]) + (
        f"<p>{proposal.visits:,.0f} visits of each concept: {visits_words(proposal.visits)}. The loss follows the "
        f"visits ({measured}, measured on emoji). Minutes in proportion to rates measured on {html.escape(MEASURED_ON)}.</p>"
    )


def _choices(proposal: Proposal) -> str:
    tree = proposal.config.model_dump(mode="json")

    def value(key: str) -> object:
        node: object = tree
        for part in key.split("."):
            assert isinstance(node, dict)
            node = node[part]
        return node

    lines = [(key, value(key), reason) for key, reason in sorted(proposal.reasons.items())]
    return table(("setting", "value", "why"), lines) + f"<p>All else as in configs/{proposal.base}.</p>"


def _counts(facts: Facts) -> str:
    about = "" if facts.exact else "about "
    lines: list[tuple[object, ...]] = [
        ("source", facts.source, facts.kind),
        ("shards", f"{facts.shards:,}", f"{facts.opened:,} opened, {len(facts.damaged)} of them damaged"),
        (
            "samples",
            f"{about}{facts.samples:,}",
            f"{facts.counted:,} seen by name, {facts.looked:,} read, {facts.decoded:,} decoded",
        ),
        ("usable", f"{'' if facts.whole else 'about '}{facts.usable:,}", "with picture and caption"),
        ("equal pictures", f"{facts.duplicates:,}", f"byte for byte, among {len(facts.headers):,}"),
    ]
    for counts, of in (
        (facts.problems, f"of {facts.counted:,} seen"),
        (facts.faults, f"of {facts.looked:,} read"),
    ):
        lines += [
            (f"rejected: {name}", f"{count:,}", f"{of}: {REASONS.get(name, '')}")
            for name, count in counts.items()
        ]
    lines += [("damaged", "", said) for said in facts.damaged[:5]]
    return table(("", "", ""), lines)


def _pictures(facts: Facts) -> str:
    kinds: dict[str, int] = {}
    for header in facts.headers:
        kinds[f"{header.kind} {header.mode}"] = kinds.get(f"{header.kind} {header.mode}", 0) + 1
    for name, count in (
        ("with transparency", sum(header.transparent for header in facts.headers)),
        ("animated", sum(header.animated for header in facts.headers)),
    ):
        kinds[name] = count
    kinds_table = table(
        ("", "pictures read"), [(name, f"{count:,}") for name, count in sorted(kinds.items())]
    )
    return (
        histogram([header.short for header in facts.headers], "shorter side, pixels")
        + histogram([header.width / header.height for header in facts.headers], "width over height")
        + histogram([header.file_bytes / 1000 for header in facts.headers], "kilobytes of a file")
        + kinds_table
    )


def _captions(facts: Facts) -> str:
    captions = facts.captions
    repeated = "; ".join(f"{_short(text)} ({count})" for text, count in captions.repeated[:5]) or "none"
    lines = [
        ("read", f"{len(captions.all):,}"),
        ("different ones", f"{captions.distinct:,}"),
        ("different words, digits, signs", f"{captions.distinct_words():,}"),
        ("a sample", f"{captions.typical_a_sample} usually, at most {captions.most_a_sample}"),
        ("most frequent", repeated),
        ("longest", _short(captions.longest)),
    ]
    drawings = histogram(captions.words(), "words, digits and signs of a caption")
    return (
        drawings
        + histogram([len(text) for text in captions.all], "characters of a caption")
        + table(("", ""), lines)
    )


def _short(text: str) -> str:
    return text if len(text) <= LONG_CAPTION else text[:LONG_CAPTION] + "\N{HORIZONTAL ELLIPSIS}"


def _gallery(examples: Sequence[Example], proposal: Proposal) -> str:
    rules = Rules.from_config(proposal.config.encode)
    figures = "".join(_figures(examples, rules))
    return f"<div class='gallery'>{figures}</div>" if figures else ""


def _figures(examples: Sequence[Example], rules: Rules) -> Iterator[str]:
    for example in examples:
        outcome = prepare_image(example.payload, rules)
        said = html.escape(_short(example.caption))
        if isinstance(outcome, Picture):
            shown = picture(png_bytes(outcome.pixels), "", f"height='{SHOWN_PIXELS}'")
            yield f"<figure>{shown}<figcaption>{said}</figcaption></figure>"
        else:
            yield f"<figure><figcaption><b>{outcome.reason}</b><br>{said}</figcaption></figure>"
