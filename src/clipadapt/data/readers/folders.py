"""Data sets from folders of image files."""

from __future__ import annotations

import os
from pathlib import Path

from clipadapt.data.examples import Dataset
from clipadapt.data.items import FileItem, Item
from clipadapt.errors import DataError
from clipadapt.renamed import old_names

# What counts as an image file; case is ignored.
IMAGE_SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".avif", ".tga"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
}
_PARTS = {"train", "training", "val", "valid", "validation", "test", "testing"}
_ARCHIVES = {".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"}


def image_folder(root: str | os.PathLike[str]) -> Dataset:
    """The images under `root`, which has one sub-folder per class, named after it.

    Classes are sorted by name, and so are the images of a class, which may be in deeper folders. Hidden files
    and folders (".…", "__MACOSX") and files whose ending is not in `IMAGE_SUFFIXES` are skipped, as are files
    directly in `root`.

    Raises:
        DataError: `root` is missing or not a folder, has no sub-folders, or a sub-folder holds no image.
    """
    root = Path(root)
    if not root.exists():
        raise DataError(f"{root} does not exist; a folder with one sub-folder per class is needed.")
    if root.suffix.lower() in _ARCHIVES and root.is_file():
        raise DataError(f"{root} is an archive; unpack it and give the folder.")
    if not root.is_dir():
        raise DataError(f"{root} is a file; a folder with one sub-folder per class is needed.")
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not _hidden(entry.name))
    if not folders:
        loose = len(image_files(root))
        raise DataError(
            f"{root} holds {loose} images and no sub-folders; "
            "put the images of each class into a sub-folder named after the class."
        )
    if {folder.name.lower() for folder in folders} <= _PARTS:
        parts = " and ".join(folder.name for folder in folders)
        raise DataError(f"{root} is divided into {parts}, which are not classes; read each of them separately.")

    items: list[Item] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        files = image_files(folder)
        if not files:
            raise DataError(f"The class folder {folder} holds no images; add some or remove it.")
        items += map(FileItem, files)
        labels += [label] * len(files)
    return Dataset(items, labels, [folder.name for folder in folders], name=root.resolve().name)


def image_files(folder: str | os.PathLike[str]) -> list[str]:
    """Paths of the images in `folder` and below, sorted; `image_folder` says what is skipped."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not _hidden(name)]
        for name in files:
            if not _hidden(name) and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                found.append(os.path.join(parent, name))
    return sorted(found)


__getattr__ = old_names(__name__)


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"
