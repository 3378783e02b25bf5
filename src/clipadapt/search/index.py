"""Embedded images that can be searched: the embeddings, the store that finds neighbours, the model of the queries.

`build_index` puts embeddings into a store and records that in `index.json` next to them; without one they are searched
exactly, in place. While a store is filled, `.index.json` tells how far it is; it becomes `index.json` at the end.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import torch

from clipadapt.backbones import load_backbone
from clipadapt.embeddings import Embeddings
from clipadapt.errors import ArtifactError, ClipadaptError, unknown_name
from clipadapt.features.retrieval import top
from clipadapt.files import written_aside
from clipadapt.methods import load
from clipadapt.search.stores.registry import STORES, open_store
from clipadapt.search.where import Where

if TYPE_CHECKING:
    from clipadapt.search.stores.store import VectorStore

FORMAT = 1  # raised when an older version of the library could not read index.json any more
_BLOCK = 1 << 14  # rows that are added or classified at once
_SECONDS = 60  # after which a store that is being filled is put on the disk


@dataclass(frozen=True)
class Hit:
    """One image that was found.

    rank   from 1
    score  cosine with the query, or the probability of a class
    id     its row in the embeddings
    name   its path, where it is a file
    facts  what else the embeddings' table knows, as JSON values; dates are ISO texts
    """

    rank: int
    score: float
    id: int
    name: str
    facts: dict[str, Any]


class Index:
    """Embeddings of N images, ready to be searched.

    Attributes:
        embeddings: the images, whose rows are the ids.
        store: finds neighbours; exact where `build_index` made no other.
        kind: the store's name.
    """

    def __init__(self, embeddings: Embeddings, store: VectorStore, kind: str, model: Any = None) -> None:
        self.embeddings, self.store, self.kind = embeddings, store, kind
        self._given = model
        if isinstance(model, str | Path):
            self._given = load(model)
        if self._given is not None:
            self.check(self._given)

    @classmethod
    def open(cls, folder: str | Path, model: Any | str | Path | None = None) -> Index:
        """The embeddings in `folder` with the store that was made of them.

        Args:
            folder: what `clipadapt embed` wrote.
            model: encodes queries, or the folder of an adapted model that does; without it, the one that the images
                were embedded with, loaded when it is needed.

        Raises:
            ArtifactError: the embeddings are incomplete or damaged, the index is of older ones, or the model sees
                images differently from the model that embedded them.
        """
        embeddings = Embeddings(folder)
        state = _read_state(embeddings.folder / "index.json")
        if state is None:
            return cls(embeddings, _exact(embeddings), "exact", model)
        if state["embeddings"] != _identity(embeddings):
            raise ArtifactError(
                f"{folder} was embedded again after indexing: run `clipadapt index {folder}` again as before."
            )
        place = _place(state, embeddings)
        store = open_store(state["store"], place, embeddings.dim, embeddings=embeddings)
        if len(embeddings) and not store.count():
            raise ArtifactError(f"{place} is now empty: run `clipadapt index {folder}` again with the same options.")
        return cls(embeddings, store, state["store"], model)

    @cached_property
    def model(self) -> Any:
        """What encodes queries: a backbone or an adapted model."""
        if self._given is not None:
            return self._given
        made_with = self.embeddings.model
        try:
            model = load(made_with) if made_with else load_backbone(self.embeddings.backbone["source"])
        except ClipadaptError as error:
            raise type(error)(
                f"The model that {self.embeddings.folder} was embedded with is not available: {error}"
            ) from None
        self.check(model)
        return model

    @property
    def adapts_texts(self) -> bool:
        """Whether the model encodes texts differently from the backbone it was adapted from."""
        return self.model.kind != "backbone" and self.model.adapts_texts

    def check(self, model: Any) -> None:
        """Raise `ArtifactError` unless `model` encodes images like the model that embedded them."""
        adapted = model.kind != "backbone"
        if adapted and model.backbone_ is None:
            raise ArtifactError(f"This {model.card.key} was fitted on features: it has no text tower to search with.")
        if model.encoder.image_fingerprint != self.embeddings.image_fingerprint:
            what = f"This {model.card.key} model" if adapted else model.source
            raise ArtifactError(
                f"{what} encodes images differently from the model used to embed {self.embeddings.folder}: "
                "embed them with it, by `clipadapt embed PHOTOS --model MODEL --out NEW` (of a backbone, --backbone)."
            )

    def __len__(self) -> int:
        return len(self.embeddings)

    def search(self, vectors: np.ndarray, k: int = 20, where: Where | str | None = None) -> list[list[Hit]]:
        """The k images nearest to each of the unit vectors (Q, D), best first: Q lists, shorter where fewer are left.

        `where` is a condition on the facts that all hits fulfil (see `Where.parse`).
        """
        queries = np.ascontiguousarray(vectors, np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.embeddings.dim or not np.isfinite(queries).all():
            raise ClipadaptError(f"Queries must be finite, of shape (Q, {self.embeddings.dim}), not {queries.shape}.")
        _check_k(k)
        scores, ids = self.store.search(queries, k, _parse(where))
        return [self.hits(found[found >= 0], values[found >= 0]) for values, found in zip(scores, ids, strict=True)]

    def class_scores(self, name: str) -> np.ndarray:
        """The probability (N,) float32 that each image shows the class `name` of the adapted model.

        The model's own classifier judges every embedded image, so methods that leave texts as they are (caches,
        Gaussian classifiers, probes) take part in searching too. Always exact; no store is asked.
        """
        return self._class_scores(name)[0]

    def search_class(self, name: str, k: int = 20, where: Where | str | None = None) -> list[Hit]:
        """The k images that most probably show a class of the adapted model; ties go to the lower row."""
        _check_k(k)
        probabilities, margins = self._class_scores(name)
        condition, rows = _parse(where), np.arange(len(self))
        if condition is not None:
            rows = np.flatnonzero(condition.mask(self.embeddings.table))
        places = top(torch.from_numpy(margins[rows])[None], k)[1][0].numpy()
        return self.hits(rows[places], probabilities[rows[places]])

    def _class_scores(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The probabilities (N,) of a class, and margins (N,) in the same order that also separate 0s and 1s."""
        model = self.model
        if model.kind == "backbone":
            raise ClipadaptError(f"Classes are searched for with an adapted model, and {model.source} is a backbone.")
        if name not in model.class_names_:
            raise unknown_name("class of this model", name, model.class_names_)
        column = model.class_names_.index(name)
        probabilities, margins = np.empty(len(self), np.float32), np.empty(len(self), np.float32)
        for first, block in self.embeddings.blocks(_BLOCK):
            rows = slice(first, first + len(block))
            logits = torch.as_tensor(model.logits(torch.from_numpy(block.astype(np.float32))))  # (n, C)
            probabilities[rows] = model.probabilities(logits)[:, column].numpy()
            margins[rows] = logits[:, column].numpy()
            if not model.multi_label_:  # log p / (1 - p)
                others = torch.cat([logits[:, :column], logits[:, column + 1 :]], dim=1)
                margins[rows] -= others.logsumexp(dim=1).numpy()
        return probabilities, margins

    def hits(self, rows: np.ndarray, scores: np.ndarray) -> list[Hit]:
        """Rows with their scores, best first, as hits."""
        facts = self.embeddings.table.take(rows).to_pylist()
        return [
            Hit(
                rank=place + 1,
                score=float(score),
                id=int(row),
                name=known["name"],
                facts={key: _plain(value) for key, value in known.items() if key not in ("name", "digest")},
            )
            for place, (row, score, known) in enumerate(zip(rows, scores, facts, strict=True))
        ]


def build_index(
    folder: str | Path,
    kind: str = "usearch",
    location: str | None = None,
    *,
    report: Callable[[int], None] | None = None,
) -> bool:
    """Put the embeddings in `folder` into a store and note it in their `index.json`; False if that was done before.

    A search takes the new store once it is whole. The same call resumes an interrupted one.

    Args:
        folder: what `clipadapt embed` wrote.
        kind: a key of `clipadapt.search.stores.registry.STORES`; "exact" drops what there was, except on a server.
        location: a folder, or the URL of a server; without it a folder in `folder`.
        report: called with the number of rows just added.

    Raises:
        ClipadaptError: the store is not known, or its extra is missing.
        ArtifactError: the place holds other vectors, or does not keep what it was given.
    """
    if kind not in STORES:  # before anything is taken away
        raise unknown_name("store", kind, STORES)
    if location is not None and "://" in location and urlsplit(location).password:
        raise ClipadaptError(
            "index.json would store the password in that URL: leave it out, and set PGPASSWORD, ~/.pgpass or "
            "QDRANT_API_KEY."
        )
    embeddings = Embeddings(folder)
    finished, unfinished = embeddings.folder / "index.json", embeddings.folder / ".index.json"
    earlier = [state for state in map(_read_state, (finished, unfinished)) if state is not None]
    if kind == "exact":
        finished.unlink(missing_ok=True)
        unfinished.unlink(missing_ok=True)
        for state in earlier:
            if state["location"] is None:
                shutil.rmtree(_place(state, embeddings), ignore_errors=True)
        return bool(earlier)
    if location is not None and "://" not in location and "=" not in location:  # a folder, no server
        location = os.path.abspath(location)
    wanted = {
        "format": FORMAT,
        "store": kind,
        "location": location,
        "embeddings": _identity(embeddings),
        "pictures": len(embeddings),
    }
    place = _place(wanted, embeddings)
    if wanted in earlier and open_store(kind, place, embeddings.dim, embeddings=embeddings).count():
        return False
    ours = [state for state in earlier if (state["store"], state["location"]) == (kind, location)]
    done = max((state["rows"] for state in ours if "rows" in state and state.items() >= wanted.items()), default=0)
    if not done:
        if any("rows" not in state for state in ours):
            finished.unlink()  # what it tells of is about to go
        if location is None:
            shutil.rmtree(place, ignore_errors=True)
    store = open_store(kind, place, embeddings.dim, embeddings=embeddings)
    if store.count() < done:  # somebody emptied it
        done = 0
    if not done and store.count():
        store.delete(np.arange(max((state["pictures"] for state in ours), default=0)))
        if store.count():
            raise ArtifactError(f"{place} holds {store.count():,} other vectors; give an empty place.")
    _write_state(unfinished, wanted | {"rows": done})
    _fill(store, embeddings, done, lambda rows: _write_state(unfinished, wanted | {"rows": rows}), report)
    if store.count() != len(embeddings):
        raise ArtifactError(f"{place} holds {store.count():,} vectors instead of the {len(embeddings):,} added.")
    _write_state(finished, wanted)
    unfinished.unlink()
    return True


def _fill(
    store: VectorStore,
    embeddings: Embeddings,
    done: int,
    remember: Callable[[int], None],
    report: Callable[[int], None] | None,
) -> None:
    """Add all rows from `done` on; `remember` gets the number of rows that are on the disk."""
    last = time.monotonic()
    for first, block in embeddings.blocks(_BLOCK):
        start, stop = max(first, done), first + len(block)
        if start < stop:
            facts = embeddings.table.slice(start, stop - start)
            store.add(np.arange(start, stop, dtype=np.int64), block[start - first :].astype(np.float32), facts)
            if time.monotonic() - last > _SECONDS:  # some stores write all that they have each time
                store.persist()
                remember(stop)
                last = time.monotonic()
        if report is not None:
            report(len(block))
    store.persist()


def _identity(embeddings: Embeddings) -> str:
    """What all parts were made from, and their checksums."""
    digest = blake2b(digest_size=16)
    for marker in sorted(embeddings.folder.glob("part-*.json")):
        digest.update(marker.read_bytes() + b"\0")
    return digest.hexdigest()


def _place(state: dict[str, Any], embeddings: Embeddings) -> str:
    """Where a store is; without a given place it is next to the embeddings and moves with them."""
    return state["location"] or str(embeddings.folder / f"index-{state['store']}")


def _exact(embeddings: Embeddings) -> VectorStore:
    return open_store("exact", embeddings.folder / "index-exact", embeddings.dim, embeddings=embeddings)


def _read_state(path: Path) -> dict[str, Any] | None:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        version = int(state["format"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise ArtifactError(f"{path} is damaged; delete it and run `clipadapt index` again.") from None
    if version > FORMAT:
        raise ArtifactError(f"{path} has format {version}; this version reads up to {FORMAT}: upgrade clipadapt.")
    return state


def _write_state(path: Path, state: dict[str, Any]) -> None:
    with written_aside(path) as aside:
        aside.write_text(json.dumps(state, ensure_ascii=False) + "\n", encoding="utf-8")


def _parse(where: Where | str | None) -> Where | None:
    return Where.parse(where) if isinstance(where, str) else where


def _check_k(k: int) -> None:
    if k < 1:
        raise ClipadaptError(f"k must be at least 1, not {k}.")


def _plain(value: Any) -> Any:
    """A fact as a JSON value."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else str(value)
