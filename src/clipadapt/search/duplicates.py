"""Duplicate images: the same content, or nearly the same. Nothing is ever deleted."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from clipadapt.errors import ClipadaptError
from clipadapt.features.retrieval import nearest

if TYPE_CHECKING:
    from clipadapt.embeddings import Embeddings

_ROWS = 4096  # of a block: 64 MB of products at once
_PENDING = 1 << 22  # links kept before they are merged


@dataclass(frozen=True)
class Kept:
    """An image to keep: its row, name, and why it and no other."""

    row: int
    name: str
    why: str


@dataclass(frozen=True)
class Copy:
    """An image that can go: its row and name, the row of the kept one it is like, their cosine, and if it is exact."""

    row: int
    name: str
    like: int
    similarity: float
    same_content: bool


@dataclass(frozen=True)
class Group:
    """Images that belong together. Each of `copies` is at least as similar as asked to one of `keep`."""

    keep: list[Kept]
    copies: list[Copy]


def near_duplicates(
    embeddings: Embeddings, threshold: float = 0.95, *, report: Callable[[int], None] | None = None
) -> list[Group]:
    """Groups of duplicates, the largest first.

    Images are linked when their contents are equal or their cosine is at least `threshold`, which is computed for
    all pairs, block by block; a group is what links connect. A chain of links can lead far: the first and the last
    of a group may differ. So of each group the largest image is kept, and every further one that is not itself
    linked to a kept one; the others are copies.

    Args:
        embeddings: N images; all pairs are compared, so that twice as many take four times as long.
        threshold: in (0, 1]; 0.95 finds other sizes and slight edits in most models. Look before deleting.
        report: called with the number of images just compared with all before them.

    Raises:
        ClipadaptError: the threshold is out of range.
    """
    if not 0 < threshold <= 1:
        raise ClipadaptError(f"threshold = {threshold:g} is out of range; it is a cosine in (0, 1].")
    contents = np.unique(np.asarray(embeddings.table["digest"].to_pylist(), dtype=str), return_inverse=True)[1]
    linked = _link(embeddings, threshold, contents, report or (lambda rows: None))
    order = np.argsort(linked, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(linked[order])) + 1) if len(order) else []
    judged = [_choose(embeddings, rows, contents, threshold) for rows in groups if len(rows) > 1]
    found = [group for group in judged if group.copies]
    return sorted(found, key=lambda group: (-len(group.copies), group.keep[0].row))


def _link(embeddings: Embeddings, threshold: float, contents: np.ndarray, report: Callable[[int], None]) -> np.ndarray:
    """(N,) numbers, equal where links connect."""
    groups = contents.copy()
    pending: list[tuple[np.ndarray, np.ndarray]] = []

    def merge() -> np.ndarray:
        left, right = (groups[np.concatenate(side)] for side in zip(*pending, strict=True))
        pending.clear()
        size = int(contents.max()) + 1
        links = coo_array((np.ones(len(left), bool), (left, right)), shape=(size, size))
        return connected_components(links, directed=False)[1][groups]

    for first, block in embeddings.blocks(_ROWS):
        rows = _unit(block)
        for start, other in embeddings.blocks(_ROWS):
            if start > first:
                break
            above = (rows @ _unit(other).T >= _limit(threshold)).numpy()
            i, j = np.nonzero(np.tril(above, -1) if start == first else above)
            if len(i):
                pending.append((i + first, j + start))
            if sum(len(side) for side, _ in pending) > _PENDING:
                groups = merge()
        report(len(block))
    return merge() if pending else groups


def _choose(embeddings: Embeddings, rows: np.ndarray, contents: np.ndarray, threshold: float) -> Group:
    """What to keep of some linked rows, and what not."""
    known = embeddings.table.take(rows).to_pylist()
    # A file embedded twice, under one path or through a link, is not a copy of itself: it must not be removed.
    files = {os.path.realpath(fact["name"]): (int(row), fact) for row, fact in zip(rows, known, strict=True)}
    facts = {row: (fact["name"], *_size(fact)) for row, fact in files.values()}
    order = sorted(facts, key=lambda row: (-facts[row][1], -facts[row][2], facts[row][0], row))
    features = _unit(embeddings.rows(order))  # (n, D)
    first, second = facts[order[0]], facts[order[min(1, len(order) - 1)]]
    keep = [Kept(order[0], first[0], _why_first(first[1:], second[1:]))]
    copies: list[Copy] = []
    places = [0]  # of the kept ones in `order`
    place_of = {contents[order[0]]: 0}
    for place, row in enumerate(order[1:], start=1):
        twin = place_of.get(contents[row])
        score, number = nearest(features[place : place + 1], features[places], 1)
        similarity = 1.0 if twin is not None else min(float(score), 1.0)
        if twin is None and similarity < _limit(threshold):
            keep.append(Kept(row, facts[row][0], "not similar enough to what is kept"))
            places.append(place)
            place_of[contents[row]] = place
        else:
            like = places[int(number)] if twin is None else twin
            copies.append(Copy(row, facts[row][0], order[like], similarity, twin is not None))
    return Group(keep, copies)


def _why_first(first: tuple[int, int], second: tuple[int, int]) -> str:
    """Why the first of two (pixels, bytes) is kept."""
    if first[0] > second[0]:
        return "most pixels"
    return "largest file, as many pixels" if first[1] > second[1] else "as large as others, first by name"


def _size(facts: dict[str, Any]) -> tuple[int, int]:
    """(pixels, bytes) of an image; 0 where they cannot be known without fetching it."""
    name = facts["name"]
    pixels = int(facts.get("width") or 0) * int(facts.get("height") or 0)
    try:
        if not pixels:
            with Image.open(name) as image:  # reads the header alone
                pixels = image.width * image.height
        return pixels, os.path.getsize(name)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return pixels, 0


def _unit(block: np.ndarray) -> torch.Tensor:
    # Rounding to float16 has left lengths of 0.999 to 1.001, which would count at a threshold of 1.
    return torch.nn.functional.normalize(torch.from_numpy(block.astype(np.float32)), dim=1)


def _limit(threshold: float) -> float:
    return threshold - 1e-6  # rounding of the product of equal rows
