"""The Qdrant store: vectors and facts as points of a collection on a server."""

from __future__ import annotations

import base64
import os
from datetime import date
from typing import TYPE_CHECKING, Any

import numpy as np

from clipadapt.errors import ArtifactError, ClipadaptError
from clipadapt.search.stores.rows import answer, as_ids, as_queries, as_rows, no_facts, nulls, split_name

if TYPE_CHECKING:
    import pyarrow

    from clipadapt.search.where import Where

COLLECTION = "clipadapt"
BATCH_ROWS = 256
BATCH_QUERIES = 64


class QdrantStore:
    """A collection of float16 vectors, with its facts' Arrow schema in its metadata (Qdrant 1.16 or newer).

    Each change is kept when the call returns. The server builds its own index; in `:memory:` every vector is compared.
    """

    def __init__(self, location: str, dim: int) -> None:
        """Open `http://host:6333#collection` (its key is in QDRANT_API_KEY), or `:memory:`, which keeps nothing."""
        from qdrant_client import QdrantClient

        self.dim = dim
        url, self.collection = split_name(location, COLLECTION)
        if location != ":memory:" and not location.startswith(("http://", "https://")):
            # The client could keep a folder, too, as pickles, and opening one would run any code in it.
            raise ClipadaptError(f"The qdrant store needs the URL of a server, http://host:6333#name, not {location}.")
        try:
            if location == ":memory:":
                self._client = QdrantClient(location)
            else:
                key = os.environ.get("QDRANT_API_KEY")
                self._client = QdrantClient(url=url, api_key=key, check_compatibility=False)
            self._made = self._client.collection_exists(self.collection)
        except Exception as error:  # each of the client's transports has its own errors
            raise ClipadaptError(f"Qdrant cannot be reached at {url}: {error}") from None
        self._schema: pyarrow.Schema | None = None
        if self._made:
            config = self._client.get_collection(self.collection).config
            width = getattr(config.params.vectors, "size", None)
            if width != dim:
                raise ArtifactError(f"{location} holds vectors of width {width}, not {dim}.")
            self._schema = _schema((config.metadata or {}).get("facts"))

    def add(self, ids: np.ndarray, vectors: np.ndarray, facts: pyarrow.Table | None = None) -> None:
        from qdrant_client import models

        ids, vectors, facts = as_rows(ids, vectors, facts, self.dim, self._schema if self._made else None)
        if len(ids) == 0:
            return
        if not self._made:
            self._create(None if facts is None else facts.schema)
        if facts is None and self._schema is not None:
            facts = nulls(len(ids), self._schema)
        for first in range(0, len(ids), BATCH_ROWS):
            rows = slice(first, first + BATCH_ROWS)
            payloads = None if facts is None else _payloads(facts.slice(first, BATCH_ROWS))
            batch = models.Batch(ids=ids[rows].tolist(), vectors=vectors[rows].tolist(), payloads=payloads)
            self._client.upsert(self.collection, batch, wait=True)

    def delete(self, ids: np.ndarray) -> None:
        from qdrant_client import models

        ids = as_ids(ids)
        if self._made and len(ids):
            self._client.delete(self.collection, models.PointIdsList(points=ids.tolist()), wait=True)

    def search(self, queries: np.ndarray, k: int, where: Where | None = None) -> tuple[np.ndarray, np.ndarray]:
        from qdrant_client import models

        queries = as_queries(queries, k, self.dim)
        if not self._made:
            return answer([((), ())] * len(queries), k)
        if where is not None and self._schema is None:
            raise no_facts()
        condition = None if where is None else where.qdrant(self._schema)
        found = []
        for first in range(0, len(queries), BATCH_QUERIES):
            asked = [
                models.QueryRequest(query=query.tolist(), limit=k, filter=condition)
                for query in queries[first : first + BATCH_QUERIES]
            ]
            for response in self._client.query_batch_points(self.collection, asked):
                found.append(([point.score for point in response.points], [point.id for point in response.points]))
        return answer(found, k)

    def count(self) -> int:
        return self._client.count(self.collection, exact=True).count if self._made else 0

    def persist(self) -> None:
        pass

    def _create(self, facts: pyarrow.Schema | None) -> None:
        from qdrant_client import models

        form = models.VectorParams(size=self.dim, distance=models.Distance.DOT, datatype=models.Datatype.FLOAT16)
        known = {} if facts is None else {"facts": base64.b64encode(facts.serialize()).decode()}
        self._client.create_collection(self.collection, vectors_config=form, metadata=known)
        self._made, self._schema = True, facts


def _schema(text: str | None) -> pyarrow.Schema | None:
    import pyarrow

    return None if text is None else pyarrow.ipc.read_schema(pyarrow.py_buffer(base64.b64decode(text)))


def _payloads(facts: pyarrow.Table) -> list[dict[str, Any]]:
    return [{name: _json(value) for name, value in row.items()} for row in facts.to_pylist()]


def _json(value: Any) -> Any:
    if isinstance(value, date):  # and datetime
        return value.isoformat()
    return None if isinstance(value, bytes) else value
