"""Images without a daemon or a registry: buildah in a folder of its own, from a base that debootstrap makes."""

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from configparser import ConfigParser, Error
from pathlib import Path

# The base needs apt and Python 3.11 or later as `python`: what the Dockerfile says of any base.
SUITE, MIRROR = "bookworm", "http://deb.debian.org/debian"
PACKAGES = ("python3", "python3-venv", "python-is-python3", "ca-certificates")
CERTIFICATES = Path("/etc/ssl/certs")
PIP_CONFIG = Path("/etc/pip.conf")
BUILD_SECONDS = 1500


class Images:
    """A store of images below one folder, and what can be done with them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._words = ["buildah", "--root", str(folder / "storage"), "--runroot", str(folder / "run")]

    def call(self, *words: str, seconds: float = 600.0) -> str:
        """Run one of buildah's commands and return what it printed; a failure shows the end of what it said."""
        done = subprocess.run(
            [*self._words, *words],
            text=True,
            capture_output=True,
            timeout=seconds,
            check=False,
            errors="replace",
        )
        assert done.returncode == 0, f"buildah {words[0]}: exit code {done.returncode}\n{done.stderr[-4000:]}"
        return done.stdout

    def base(self, name: str) -> None:
        """Make the base image: a Debian without build tools."""
        root = self.folder / "rootfs"
        words = [
            "debootstrap",
            "--variant=minbase",
            f"--include={','.join(PACKAGES)}",
            SUITE,
            str(root),
            MIRROR,
        ]
        made = subprocess.run(words, text=True, capture_output=True, timeout=600, check=False)
        assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]
        shutil.rmtree(root / "var/cache/apt/archives", ignore_errors=True)
        container = self.call("from", "scratch").strip()
        self.call("add", "--quiet", container, str(root), "/")
        self.call("config", "--env", "PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", container)
        self.call("commit", "--quiet", "--rm", container, name)
        shutil.rmtree(root)

    def build(self, context: Path, name: str, base: str) -> None:
        """Build the Dockerfile in `context`; wheels, pip's settings and certificates of this machine are mounted."""
        volumes = [f"--volume={place}:{place}:ro" for place in machine_folders()]
        wheels = [place for place in pip_settings("find-links") if Path(place).is_dir()]
        arguments = [f"--build-arg=BASE_IMAGE={base}"]
        arguments += [f"--build-arg=PIP_ARGS=--find-links {wheels[0]}"] if wheels else []
        isolation = ["--isolation=chroot", "--network=host", "--pull=false"]
        self.call(
            "build", *isolation, *volumes, *arguments, f"--tag={name}", str(context), seconds=BUILD_SECONDS
        )

    @contextlib.contextmanager
    def container(self, image: str, mounts: Sequence[str] = ()) -> Iterator["Container"]:
        """Yield a container of `image`; it is removed after."""
        name = self.call("from", "--pull-never", image).strip()
        try:
            yield Container(self, name, mounts)
        finally:
            self.call("rm", name)


class Container:
    """A container that commands can be run in, as the image's own user."""

    def __init__(self, images: Images, name: str, mounts: Sequence[str]) -> None:
        self._images, self._name = images, name
        self._volumes = [f"--volume={mount}" for mount in mounts]

    def run(self, *words: str, seconds: float = 300.0) -> str:
        """Run a command inside and return what it printed on standard output."""
        given = ["--isolation=chroot", "--network=host", *self._volumes]
        return self._images.call("run", *given, self._name, "--", *words, seconds=seconds)


def machine_folders() -> list[str]:
    """Return what a build on this machine needs to reach its packages: certificates, pip's settings, local indexes."""
    places = [CERTIFICATES, *([PIP_CONFIG] if PIP_CONFIG.is_file() else [])]
    local = [*pip_settings("find-links"), *pip_settings("extra-index-url"), *pip_settings("index-url")]
    for word in local:
        place = Path(re.sub(r"^file://", "", word))
        if place.is_absolute() and place.is_dir():
            # An index of files points beside itself.
            places.append(place.parent if place.name == "simple" else place)
    return list(dict.fromkeys(map(str, places)))


def pip_settings(name: str) -> list[str]:
    """Return the words of one of pip's global settings, as its file or the environment gives them."""
    parser = ConfigParser(interpolation=None)
    with contextlib.suppress(OSError, Error):
        parser.read(PIP_CONFIG)
    told = os.environ.get(f"PIP_{name.upper().replace('-', '_')}", "")
    return [*told.split(), *parser.get("global", name, fallback="").split()]
