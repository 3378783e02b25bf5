"""The argument PHOTOS of `adapt` and `evaluate`: a folder, a table, or a published split."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipadapt.errors import DataError

if TYPE_CHECKING:
    from clipadapt.data import Dataset, MultiLabelDataset

Photos = Annotated[
    Path,
    typer.Argument(
        metavar="PHOTOS",
        help="A folder with one sub-folder per class; a .csv or .parquet table with the columns image and label; "
        "or a split_zhou_*.json file.",
    ),
]
Root = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Where the images of a split file are, if not next to it.")
]


def read_photos(photos: Path, root: Path | None) -> tuple[Dataset, Dataset | None]:
    """(images to learn from, images to test on): the two parts of a published split; or all of them, and None."""
    from clipadapt.data import coop_split, image_folder, image_table

    if photos.suffix.lower() == ".json":
        split = coop_split(photos, root)
        return split.train, split.test
    if root is not None:
        raise DataError(f"--root says where the images of a split file are, but {photos} is not a .json file.")
    if photos.suffix.lower() in (".csv", ".tsv", ".parquet", ".pq") and not photos.is_dir():
        return image_table(photos), None
    return image_folder(photos), None


MultiLabel = Annotated[
    bool,
    typer.Option(
        "--multi-label",
        help="An image can show several classes: PHOTOS is a table whose label column holds names separated by ;, or "
        "has one 0/1 column per class; or a folder of images with such a table, labels.csv.",
    ),
]


def read_multi_label(photos: Path, root: Path | None) -> MultiLabelDataset:
    """Images with a set of labels each."""
    from clipadapt.data import image_table

    if root is not None or photos.suffix.lower() == ".json":
        raise DataError(
            "--multi-label reads a table of labels, or a folder that holds one; split files and --root are "
            "for images of one class each."
        )
    return image_table(photos, multi_label=True)
