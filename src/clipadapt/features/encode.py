"""Images to features: decoded by workers while the model runs, each content once, and kept on disk."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from joblib import cpu_count

from clipadapt.data import ImageItem, Item, as_items
from clipadapt.data.items import FeatureItem
from clipadapt.errors import ClipadaptError, DataError, unknown_name
from clipadapt.features.encoder import Encoder
from clipadapt.features.progress import progress_bar
from clipadapt.features.store import KEY_BYTES, FeatureStore, cache_root
from clipadapt.features.views import RandomView

# Part of every key: raise it when decoding or `RandomView` change, and with them the features of an image.
VERSION = 1

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Encoded:
    """Features of N images in the order given, without those that were skipped.

    Attributes:
        features: (N, D) float32 on the CPU, rows of unit norm; (N, V, D) where V views were asked for.
        kept: N positions in the list that was given.
        skipped: (name, reason) of every image that could not be read.
        digests: N contents, 32 hex digits each; empty where pixels or features were given.
    """

    features: torch.Tensor
    kept: list[int]
    skipped: list[tuple[str, str]]
    digests: list[str] = field(default_factory=list)


def encode_images(
    encoder: Encoder,
    images: Any,
    *,
    cache: bool | Path = True,
    batch_size: int = 64,
    workers: int | None = None,
    progress: bool = False,
    on_error: str = "raise",
    views: int = 0,
    seed: int = 1,
    min_scale: float = 0.5,
    precision: str = "float32",
    fast_decode: bool = False,
) -> Encoded:
    """Image features of `images`, computed once per content and backbone.

    An image is recognised by its bytes, not its path; a run that was interrupted, even killed, continues where it
    was. No gradient flows. The backbone's fingerprint covers its weights, preprocessing and tokenizer; inside
    `backbone.inserted(...)` or `backbone.attention(...)`, which it does not cover, pass `cache=False`.

    Args:
        encoder: a backbone, or what wraps one; see `Encoder`.
        images: what `clipadapt.data.as_items` takes; or pixels (N, 3, H, W), which are encoded but not kept. For
            `FeatureItem`s the features are returned.
        cache: keep features under $CLIPADAPT_CACHE (~/.cache/clipadapt), in the given folder, or nowhere.
        batch_size: rows per call of the model.
        workers: threads that read, decode and preprocess; as many as there are cores by default.
        progress: show a bar on stderr, if that is a terminal.
        on_error: "raise" a `DataError` that names the unreadable image (what was done so far is kept), or "skip" it.
        views: V > 0 gives V random resized crops with flips instead of the image: (N, V, D), see `RandomView`.
        seed: of the views.
        min_scale: smallest share of the area that a view shows, in (0, 1]; 0.5 is Tip-Adapter's choice, 0.08 CoOp's.
        precision: "float32", or "float16" to keep half the bytes, which rounds the features.
        fast_decode: decode large JPEGs at a half, quarter or eighth of their size, but no smaller than twice what the
            model sees; faster, and the features change slightly. Kept apart from those of whole images.

    Raises:
        DataError: an image cannot be read and `on_error` is "raise".
        ClipadaptError: an argument is out of range, or the cache cannot be written.
    """
    if on_error not in ("raise", "skip"):
        raise unknown_name("on_error", on_error, ("raise", "skip"))
    if precision not in ("float32", "float16"):
        raise unknown_name("precision", precision, ("float32", "float16"))
    if batch_size < 1 or views < 0 or not 0 < min_scale <= 1:
        raise ClipadaptError("batch_size must be at least 1, views at least 0, and min_scale in (0, 1].")
    if fast_decode and views:
        raise ClipadaptError("fast_decode is for whole images; views are cropped from all of an image's pixels.")

    if isinstance(images, torch.Tensor):
        batches = [_features(encoder, pixels) for pixels in images.split(batch_size)] if len(images) else []
        features = np.concatenate([np.empty((0, encoder.dim), np.float32), *batches])
        return Encoded(torch.from_numpy(features), list(range(len(images))), [])

    items = as_items(images)
    ready = [item.feature for item in items if isinstance(item, FeatureItem)]
    if ready and len(ready) == len(items):
        if views:
            raise ClipadaptError("Views are crops of images, and these are features without pixels.")
        return Encoded(torch.stack(ready), list(range(len(items))), [])

    store = None
    if cache:
        root = cache_root() if cache is True else Path(cache)
        store = FeatureStore(root / "features" / f"{encoder.fingerprint}-{precision}", precision)
    plan: list[RandomView | None] = [RandomView(number, seed, min_scale) for number in range(views)]
    encoding = _Encoding(encoder, items, plan or [None], store, precision, on_error == "skip", fast_decode)
    encoding.run(batch_size, workers or cpu_count(), progress)
    features, kept, skipped = encoding.results()
    digests = [encoding.contents[index] for index in kept]
    return Encoded(torch.from_numpy(features if views else features[:, 0]), kept, skipped, digests)


class _Cell(NamedTuple):
    """One vector to compute: where it goes in the table of features, and its key in the store."""

    row: int
    column: int
    key: bytes


class _Wanted(NamedTuple):
    """One image to load: or the reason why not even its digest is known."""

    item: Item | DataError
    content: str
    cells: list[_Cell]


_Loaded = tuple[str, list[tuple[_Cell, torch.Tensor]] | DataError]  # content; pixels (3, H, W) per cell, or why not


@dataclass
class _Encoding:
    """One call of `encode_images`: contents get rows of a table in the order in which they are first seen."""

    encoder: Encoder
    items: list[Item]
    plan: list[RandomView | None]  # V columns; None: the image as it is
    store: FeatureStore | None
    precision: str
    skip: bool
    fast: bool
    contents: list[str] = field(default_factory=list)  # per item its digest
    rows: dict[str, int] = field(default_factory=dict)  # digest -> row
    unreadable: dict[str, DataError] = field(default_factory=dict)  # digest -> why
    may_decode: threading.Event = field(default_factory=threading.Event)

    def run(self, batch_size: int, workers: int, progress: bool) -> None:
        columns = len(self.plan)
        self.table = np.empty((len(self.items), columns, self.encoder.dim), np.float32)  # (N, V, D)
        # Enough images in flight to fill a batch while the model runs on another, and no more: each holds its pixels.
        ahead = max(2 * batch_size // columns, workers)
        pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        self.may_decode.set()
        bar = progress_bar("Encoding images", self.table.shape[0] * columns, progress)
        with self.store or nullcontext(), bar as self.advance:
            try:
                digests = _in_order(pool, _digest, self.items, ahead)
                loaded = _in_order(pool, self._load, self._missing(digests), ahead)
                for batch in _batches(self._readable(loaded), batch_size):
                    self._encode(batch)
            finally:
                self.may_decode.set()
                pool.shutdown(cancel_futures=True)

    def results(self) -> tuple[np.ndarray, list[int], list[tuple[str, str]]]:
        """Features (N', V, D), the N' positions kept, and (name, reason) of the others."""
        kept = [index for index, content in enumerate(self.contents) if content not in self.unreadable]
        failed = [(self.items[i].name, c) for i, c in enumerate(self.contents) if c in self.unreadable]
        skipped = [(name, str(self.unreadable[content])) for name, content in failed]
        order = [self.rows[self.contents[index]] for index in kept]
        return self.table if order == list(range(len(self.table))) else self.table[order], kept, skipped

    def _missing(self, digests: Iterable[tuple[Item, str | DataError]]) -> Iterator[_Wanted]:
        """The items whose features are neither in the store nor under way, with what is to be computed of each.

        Failures go down the same stream: everything before an unreadable image is encoded before it is reported.
        """
        for item, digest in digests:
            content = digest if isinstance(digest, str) else f"unread {len(self.contents)}"
            self.contents.append(content)
            if isinstance(digest, DataError):
                yield _Wanted(digest, content, [])
            elif content in self.rows:
                self.advance(len(self.plan))
            else:
                row = self.rows[content] = len(self.rows)
                cells = [_Cell(row, column, _key(content, view, self.fast)) for column, view in enumerate(self.plan)]
                if missing := [cell for cell in cells if not self._recall(cell)]:
                    yield _Wanted(item, content, missing)

    def _recall(self, cell: _Cell) -> bool:
        features = self.store.get(cell.key) if self.store else None
        if features is None:
            return False
        self.table[cell.row, cell.column] = features
        self.advance(1)
        return True

    def _load(self, wanted: _Wanted) -> _Loaded:
        """In a worker: decode one image and preprocess those of its views that are missing."""
        item, content, cells = wanted
        if isinstance(item, DataError):
            return content, item
        self.may_decode.wait()
        try:
            if self.plan == [None] and not self.fast:
                return content, [(cell, self.encoder.prepare(item)) for cell in cells]
            image = item.open_reduced(2 * max(self.encoder.image_size)) if self.fast else item.open()
        except DataError as error:
            return content, error
        views = [self.plan[cell.column] for cell in cells]
        crops = [image if view is None else view.of(image, content, self.encoder.image_size) for view in views]
        prepared = (self.encoder.prepare(ImageItem(item.name, crop)) for crop in crops)
        return content, list(zip(cells, prepared, strict=True))

    def _readable(self, loaded: Iterable[_Loaded]) -> Iterator[tuple[_Cell, torch.Tensor]]:
        for content, pixels in loaded:
            if isinstance(pixels, DataError):
                self._fail(content, pixels)
            else:
                yield from pixels

    def _fail(self, content: str, error: DataError) -> None:
        if not self.skip:
            raise error
        self.unreadable[content] = error
        self.advance(len(self.plan))

    def _encode(self, batch: list[tuple[_Cell, torch.Tensor]]) -> None:
        cells = [cell for cell, _ in batch]
        # On a CPU, decoding would take cores from the model, whose threads wait for the slowest of them.
        if torch.device(self.encoder.device).type == "cpu":
            self.may_decode.clear()
        features = _features(self.encoder, torch.stack([pixels for _, pixels in batch])).astype(self.precision)
        self.may_decode.set()
        self.table[[cell.row for cell in cells], [cell.column for cell in cells]] = features
        if self.store:
            self.store.add([cell.key for cell in cells], features)
        self.advance(len(cells))


def _features(encoder: Encoder, pixels: torch.Tensor) -> np.ndarray:
    """(B, 3, H, W) -> (B, D), in full precision even under a caller's autocast: kept features must not depend on it."""
    device = torch.device(encoder.device)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        return encoder.encode(pixels.to(device)).float().cpu().numpy()


def _key(content: str, view: RandomView | None, fast: bool) -> bytes:
    facts = f"{VERSION} {content} {tuple(view or ())}" + " fast" * fast
    return blake2b(facts.encode(), digest_size=KEY_BYTES).digest()


def _digest(item: Item) -> tuple[Item, str | DataError]:
    try:
        item = item.fetched()
        return item, item.digest()
    except DataError as error:
        return item, error


def _in_order(pool: ThreadPoolExecutor, work: Callable[[T], R], inputs: Iterable[T], ahead: int) -> Iterator[R]:
    """`map(work, inputs)` by the pool, at most `ahead` results before they are taken."""
    running: deque[Future[R]] = deque()
    for argument in inputs:
        running.append(pool.submit(work, argument))
        if len(running) > ahead:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


def _batches(values: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(values)
    while batch := list(islice(iterator, size)):
        yield batch
