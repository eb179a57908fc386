"""`ldm init FOLDER`: look, propose, write NAME.yaml and NAME.html beside each other; nothing is ever overwritten."""

import re
from dataclasses import dataclass
from pathlib import Path

from launch.init.commented import commented
from launch.init.cost import visits_words
from launch.init.look import Facts, look_at
from launch.init.page import render
from launch.init.proposal import Machine, Proposal, named
from launch.init.propose_cpu import propose_for_cpu
from launch.init.propose_gpu import propose_for_gpu
from pipeline.config_file import load_config
from pipeline.errors import ConfigError
from pipeline.publish import publish_first, temporary_beside

UNFIT = re.compile(r"[^A-Za-z0-9._-]+")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")


@dataclass(frozen=True)
class Written:
    """What init wrote, and what it says on the terminal."""

    config: Path
    report: Path
    words: str


def init_folder(source: str, out: Path, machine: Machine, name: str | None = None) -> Written:
    """Return where config and report of a run on `source` were written, after looking at it.

    Raises:
        ConfigError: when the name is unfit, a file is there already, or the folder cannot be read.
        DataError: when the folder holds nothing that can be trained on.
    """
    source = source.rstrip("/") or source
    name = named_after(source) if name is None else name
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"init --name: {name!r}; letters, digits and ._- only, a letter or digit first, at most 80"
        )
    config_path, report_path = out / f"{name}.yaml", out / f"{name}.html"
    for path in (config_path, report_path):
        _refuse_existing(path)
    facts = look_at(source)
    propose = propose_for_cpu if machine.device == "cpu" else propose_for_gpu
    proposal = propose(facts, machine, name)
    command = _command(config_path, machine)
    head = (
        f"A run on {source}, proposed by `ldm init` from what it found there: {report_path.name} shows that.\n"
        f"Every setting stands here with its reason; start it with `{command}`."
    )
    out.mkdir(parents=True, exist_ok=True)
    _publish(config_path, commented(proposal.config, proposal.reasons, proposal.base, head))
    assert load_config(config_path) == proposal.config, config_path
    _publish(report_path, render(facts, proposal, command))
    return Written(config_path, report_path, _words(facts, proposal, (config_path, report_path), command))


def named_after(source: str) -> str:
    """Return a run name made of the last part of a folder or URL."""
    last = Path(source).resolve().name if "://" not in source else source.rpartition("/")[2]
    return UNFIT.sub("-", last).strip("-._")[:80] or "own"


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise ConfigError(
            f"init: {path} is there already and is never overwritten; give --name or --out, or move it away"
        )


def _publish(path: Path, text: str) -> None:
    beside = temporary_beside(path)
    beside.write_text(text, encoding="utf-8")
    if not publish_first(beside, path):
        _refuse_existing(path)


def _command(config: Path, machine: Machine) -> str:
    if machine.device == "cpu":
        return f"ldm demo {config}"
    return " && ".join(f"ldm {verb} {config}" for verb in ("check", "encode", "finalize", "train"))


def _words(facts: Facts, proposal: Proposal, files: tuple[Path, Path], command: str) -> str:
    encode, about = proposal.config.encode, "" if facts.whole else "about "
    lines = [
        f"found     {facts.kind}: {facts.samples:,} samples, {about}{facts.usable:,} usable, {about}{facts.concepts:,} different "
        f"captions ({facts.looked:,} read, {facts.seconds:.1f} s)"
    ]
    rejected = {**facts.problems, **facts.faults}
    lines += [f"rejected  {named(rejected)}"] if rejected else []
    shape = "a square crop" if encode.buckets is None else f"{len(encode.buckets)} buckets"
    lines.append(f"pictures  {encode.image_size} px, {shape}; {proposal.shapes.reason}")
    if proposal.gpu is None:
        lines.append(
            f"takes     about {proposal.minutes:.0f} minutes here: {proposal.visits:.0f} visits of each concept, "
            f"{visits_words(proposal.visits)}"
        )
    else:
        gpu = proposal.gpu
        lines.append(
            f"takes     about {gpu.train_hours + gpu.encode_hours:,.1f} {gpu.device}-hours on {gpu.devices} devices (an "
            "estimate from published speeds)"
        )
    lines += [f"note      {note}" for note in proposal.notes]
    lines += [f"config    {files[0]}", f"report    {files[1]}", f"next      {command}"]
    return "\n".join(lines)
