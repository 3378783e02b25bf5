"""The embedded images that can be searched over HTTP, and their thumbnails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipadapt.errors import ClipadaptError, unknown_name
from clipadapt.search.images import named_image
from clipadapt.search.index import Hit, Index
from clipadapt.serve.limits import open_image
from clipadapt.serve.models import Models, Served

_SIDE = 256  # longest side of a thumbnail, pixels


@dataclass(frozen=True, eq=False)
class SearchedIndex:
    """One index and the model that encodes its queries where none is asked for."""

    id: str
    index: Index
    served: Served

    def thumbnail(self, row: int, max_pixels: int) -> bytes:
        """The image of a row as a small JPEG; raises `DataError` if it is not where it was."""
        name = self.index.embeddings.table["name"][row].as_py()
        image = open_image(named_image(name).read(), f"The image of row {row}", max_pixels)
        image.thumbnail((_SIDE, _SIDE), Image.Resampling.BICUBIC, reducing_gap=2.0)
        file = BytesIO()
        image.save(file, "JPEG", quality=85)
        return file.getvalue()


@dataclass(frozen=True)
class Search:
    """unit vector (D,) -> hits, for the searches of one index with the same number of hits and the same condition."""

    searched: SearchedIndex
    top: int
    where: str | None

    def __call__(self, items: Sequence[np.ndarray]) -> list[list[Hit]]:
        return self.searched.index.search(np.stack(items), self.top, self.where)


class Indexes:
    """The indexes by id, the first of which is searched where none is asked for.

    The queries of each are encoded by the first model that sees images as they were embedded. Where there is none,
    the model or backbone that embedded them is served, too.
    """

    def __init__(self, folders: Sequence[Path | str], models: Models) -> None:
        self.searched: dict[str, SearchedIndex] = {}
        for folder in folders:
            index = Index.open(folder)
            name = Path(folder).resolve().name
            if name in self.searched:
                raise ClipadaptError(f"Two indexes are called {name!r}; rename one of the folders.")
            made_with = index.embeddings
            served = models.for_embeddings(made_with.image_fingerprint)
            if served is None and made_with.model:
                served = models.add(made_with.model)
            elif served is None:
                served = models.add_backbone(made_with.backbone["source"])
            index.check(served.model)
            self.searched[name] = SearchedIndex(name, index, served)

    def get(self, name: str | None) -> SearchedIndex:
        """The index called `name`, or the first one."""
        if not self.searched:
            raise ClipadaptError("This server has no index; start it with --index EMB.")
        if name is None:
            return next(iter(self.searched.values()))
        if name not in self.searched:
            raise unknown_name("index", name, self.searched)
        return self.searched[name]

    def describe(self) -> list[dict[str, Any]]:
        """What clients are told."""
        return [
            {"id": name, "images": len(searched.index), "pictures": len(searched.index)}
            for name, searched in self.searched.items()
        ]
