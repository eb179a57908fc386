"""The container recipe as text: what its build may take in, and what its last stage may hold."""

import fnmatch
import json
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD_TOOLS = "build-essential gcc g++ clang make cmake git curl wget nvcc rustc cargo upgrade pip".split()
LEFT_OUT = (
    ".git/config .env launch/.env configs/.env.local runs/demo/config.yaml .venv/bin/python id_rsa data/00000.tar "
    "pipeline/__pycache__/errors.cpython-311.pyc tests/test_floors.py ldm.egg-info/PKG-INFO launch/x.egg-info/a"
).split()


def instructions() -> list[tuple[str, str]]:
    """Return (instruction, arguments) in order, continued lines joined, comments gone."""
    lines = [
        line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")
    ]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found = []
    for line in joined.splitlines():
        if line.strip():
            name, _, arguments = line.strip().partition(" ")
            found.append((name.upper(), arguments.strip()))
    return found


def stages() -> list[list[tuple[str, str]]]:
    """Return the instructions of each stage, its FROM first."""
    found: list[list[tuple[str, str]]] = []
    for instruction in instructions():
        if instruction[0] == "FROM":
            found.append([])
        if found:
            found[-1].append(instruction)
    return found


def of(stage: list[tuple[str, str]], *names: str) -> list[str]:
    return [arguments for name, arguments in stage if name in names]


def test_every_stage_stands_on_the_base_given_at_build_time() -> None:
    before_first_stage = instructions()[: [name for name, _ in instructions()].index("FROM")]
    (base,) = of(before_first_stage, "ARG")
    name, _, default = base.partition("=")
    assert name == "BASE_IMAGE"
    assert re.fullmatch(r"python:3\.1[1-9]-[a-z-]+", default), "a tag, and not `latest`"
    assert len(stages()) >= 2
    for stage in stages():
        assert re.fullmatch(r"\$\{BASE_IMAGE\} AS [a-z]+", stage[0][1])


def test_the_last_stage_runs_as_nobody_special() -> None:
    (user,) = of(stages()[-1], "USER")
    uid, _, gid = user.partition(":")
    assert int(uid) >= 1000 and int(gid) >= 1000, "numeric, so that a cluster can check it"
    names = [name for name, _ in stages()[-1]]
    assert not {"RUN", "COPY"} & set(names[names.index("USER") :])
    created = " ".join(of(stages()[-1], "RUN"))
    assert f"--uid {uid} " in created and f"--gid {gid} " in created


def test_the_last_stage_holds_no_build_tools() -> None:
    text = " ".join(of(stages()[-1], "RUN"))
    packages = re.findall(r"apt-get install ((?:[^&;|]+))", text)
    assert [word for package in packages for word in package.split() if not word.startswith("-")] == ["tini"]
    for tool in BUILD_TOOLS:
        assert not re.search(rf"(?<![\w-]){re.escape(tool)}(?![\w-])", text), tool
    assert not re.search(r"-dev\b", text)
    copied = of(stages()[-1], "COPY")
    assert [source for source in copied if source.startswith("--from=")] == ["--from=build /opt/ldm /opt/ldm"]


def test_tini_is_the_first_process_and_hands_signals_on() -> None:
    (entrypoint,) = of(stages()[-1], "ENTRYPOINT")
    assert json.loads(entrypoint)[:2] == ["/usr/bin/tini", "--"]
    assert json.loads(entrypoint)[2:] == ["ldm"]
    (command,) = of(stages()[-1], "CMD")
    assert isinstance(json.loads(command), list)


def test_nothing_is_fetched_but_packages() -> None:
    everything = instructions()
    assert of(everything, "ADD") == []
    for run in of(everything, "RUN"):
        assert not re.search(r"https?://|ftp://|\bgit\+", run)
        assert "| sh" not in run and "|sh" not in run and "bash -c" not in run


def test_packages_are_pinned_and_leave_no_lists() -> None:
    runs = of(instructions(), "RUN")
    installs = [run for run in runs if "pip install" in run]
    assert installs
    for run in installs:
        assert "-c constraints.txt" in run and "--no-cache-dir" in run
    for run in runs:
        if "apt-get install" in run:
            assert "--no-install-recommends" in run
            assert run.index("rm -rf /var/lib/apt/lists/*") > run.index("apt-get install")


def test_no_secret_is_built_in() -> None:
    for name, arguments in instructions():
        if name in {"ARG", "ENV"}:
            assert not re.search(r"(?i)token|secret|passw|credential|api_?key|://[^/\s]*@", arguments)
        if name == "COPY":
            assert "." not in arguments.split()[:-1], "never the whole context"


def ignored(path: str) -> bool:
    """Return whether the last line of .dockerignore that fits `path`, or a folder above it, leaves it out.

    Knows the two forms the file uses: a name at the top, and `**/` before a name anywhere.
    """
    parts = path.split("/")
    result = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip().removeprefix("!")
        if pattern and not pattern.startswith("#"):
            anywhere = pattern.startswith("**/")
            names = parts if anywhere else parts[:1]
            assert "/" not in pattern.removeprefix("**/")
            if any(fnmatch.fnmatchcase(name, pattern.removeprefix("**/")) for name in names):
                result = not line.strip().startswith("!")
    return result


@pytest.mark.parametrize("path", LEFT_OUT)
def test_what_does_not_belong_into_the_image_stays_out_of_the_build(path: str) -> None:
    assert ignored(path)


def test_what_the_build_copies_is_there_and_not_left_out() -> None:
    for arguments in of(instructions(), "COPY"):
        if arguments.startswith("--from="):
            continue
        for source in arguments.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert not ignored(source), source
            if (ROOT / source).is_dir():
                file = next(
                    file
                    for file in sorted((ROOT / source).rglob("*"))
                    if file.suffix in {".py", ".yaml", ".tar"}
                )
                assert not ignored(file.relative_to(ROOT).as_posix())


def test_the_build_has_all_that_the_package_is_made_of() -> None:
    copied = {word for arguments in of(stages()[0], "COPY") for word in arguments.split()[:-1]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {
        "pyproject.toml",
        "constraints.txt",
        project["project"]["readme"],
        *project["project"]["license-files"],
    }
    packages = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert needed | packages <= copied


def test_the_apptainer_definition_makes_the_same_image() -> None:
    text = (ROOT / "apptainer.def").read_text()
    (base,) = re.findall(r"BASE_IMAGE=(\S+)\n", text.split("%files")[0].split("%arguments")[1])
    assert f"BASE_IMAGE={base}" in of(instructions(), "ARG")
    assert text.count("From: {{ BASE_IMAGE }}") == 2
    for line in of(stages()[0], "COPY"):
        for source in line.split()[:-1]:
            assert re.search(rf"^    .*\b{re.escape(source)}\b", text, re.MULTILINE), source
    for setting in re.findall(r"(\w+)=(\S+)", " ".join(of(stages()[-1], "ENV"))):
        assert "=".join(setting) in text
    assert "-c constraints.txt ." in text and "--no-cache-dir" in text
    assert "apt-get install -y --no-install-recommends tini" in text
    assert "/usr/bin/tini -- ldm" in text
