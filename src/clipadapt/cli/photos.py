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
    Path | None, typer.Option(metavar="FOLDER", help="Where the pictures of a split file lie, if not beside it.")
]


def read_photos(photos: Path, root: Path | None) -> tuple[Dataset, Dataset | None]:
    """(pictures to learn from, pictures to test on): the two parts of a published split; or all of them, and None."""
    from clipadapt.data import coop_split, image_folder, image_table

    if photos.suffix.lower() == ".json":
        split = coop_split(photos, root)
        return split.train, split.test
    if root is not None:
        raise DataError(f"--root says where the pictures of a split file lie, and {photos} is not a .json file.")
    if photos.suffix.lower() in (".csv", ".tsv", ".parquet", ".pq") and not photos.is_dir():
        return image_table(photos), None
    return image_folder(photos), None


MultiLabel = Annotated[
    bool,
    typer.Option(
        "--multi-label",
        help="A picture can show several classes: PHOTOS is a table whose label column holds names separated by ;, or "
        "has one 0/1 column a class; or a folder of pictures that holds such a table, labels.csv.",
    ),
]


def read_multi_label(photos: Path, root: Path | None) -> MultiLabelDataset:
    """Pictures with a set of labels each."""
    from clipadapt.data import image_table

    if root is not None or photos.suffix.lower() == ".json":
        raise DataError(
            "--multi-label reads a table of labels, or a folder that holds one; split files and --root are "
            "for pictures of one class each."
        )
    return image_table(photos, multi_label=True)
