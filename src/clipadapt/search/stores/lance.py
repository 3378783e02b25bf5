"""The LanceDB store: vectors and facts in one versioned table, on a disk or in an object store."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from clipadapt.errors import ArtifactError, ClipadaptError
from clipadapt.search.stores.rows import (
    ID,
    VECTOR,
    answer,
    as_ids,
    as_queries,
    as_rows,
    facts_schema,
    no_facts,
    nulls,
    vector_array,
)

if TYPE_CHECKING:
    import pyarrow

    from clipadapt.search.where import Where

TABLE = "vectors"
PROBES = 20  # of the partitions that `index` makes, how many a search looks into
REFINE = 10  # times k candidates are compared by their stored vectors


class LanceStore:
    """A LanceDB table of float16 vectors; without `index`, every vector is compared.

    Each change is a new version of the table, on the disk when the call returns. Older ones stay until LanceDB is asked
    to remove them.
    """

    def __init__(self, location: str, dim: int) -> None:
        """Open a folder or an object store's URI (`s3://bucket/path`; how to log in is LanceDB's documentation's)."""
        import lancedb

        self.location = location
        self.dim = dim
        self._table: Any = None
        try:
            self._database = lancedb.connect(location)
            with suppress(ValueError):  # that there is no such table yet
                self._table = self._database.open_table(TABLE)
        except (OSError, RuntimeError) as error:
            raise ClipadaptError(f"LanceDB cannot open {location}: {error}") from None
        if self._table is not None:
            if VECTOR not in self._table.schema.names:
                raise ArtifactError(f"The table {TABLE!r} in {location} is not clipadapt's; use another folder.")
            width = self._table.schema.field(VECTOR).type.list_size
            if width != dim:
                raise ArtifactError(f"{location} holds vectors of width {width}, not {dim}.")

    def add(self, ids: np.ndarray, vectors: np.ndarray, facts: pyarrow.Table | None = None) -> None:
        import pyarrow

        schema = self._schema()
        ids, vectors, facts = as_rows(ids, vectors, facts, self.dim, schema)
        if len(ids) == 0:
            return
        if facts is None:
            facts = nulls(len(ids), schema) if schema is not None else pyarrow.table({})
        columns = [pyarrow.array(ids), vector_array(vectors.astype(np.float16)), *facts.columns]
        rows = pyarrow.table(columns, names=[ID, VECTOR, *facts.column_names])
        if self._table is None:
            self._table = self._database.create_table(TABLE, data=rows)
        elif self._table.count_rows(f"{ID} between {ids.min()} and {ids.max()}") == 0:
            self._table.add(rows)
        else:
            merge = self._table.merge_insert(ID).when_matched_update_all().when_not_matched_insert_all()
            merge.execute(rows)

    def delete(self, ids: np.ndarray) -> None:
        ids = as_ids(ids)
        if self._table is not None and len(ids):
            self._table.delete(f"{ID} in ({', '.join(map(str, ids.tolist()))})")

    def search(self, queries: np.ndarray, k: int, where: Where | None = None) -> tuple[np.ndarray, np.ndarray]:
        queries = as_queries(queries, k, self.dim)
        if self._table is None:
            return answer([((), ())] * len(queries), k)
        condition = self._condition(where)
        return answer([self._nearest(query, k, condition) for query in queries], k)

    def count(self) -> int:
        return 0 if self._table is None else self._table.count_rows()

    def persist(self) -> None:
        pass

    def index(self, partitions: int | None = None, sub_vectors: int | None = None) -> None:
        """Build IVF_PQ, by which a search compares a part of the rows, and those roughly at first; needs 256 rows.

        Building takes minutes from some ten thousand rows on. Rows that are added later are compared one by one.

        Args:
            partitions: LanceDB's choice by default.
            sub_vectors: of each vector; LanceDB's choice by default, D/16.
        """
        from lancedb.index import IvfPq

        if self.count() < 256:
            raise ClipadaptError(f"{self.location} has {self.count()} rows, and an index needs 256.")
        plan = IvfPq(distance_type="dot", num_partitions=partitions, num_sub_vectors=sub_vectors)
        self._table.create_index(VECTOR, config=plan)

    def _schema(self) -> pyarrow.Schema | None:
        return None if self._table is None else facts_schema(self._table.schema)

    def _condition(self, where: Where | None) -> str | None:
        if where is None:
            return None
        schema = self._schema()
        if not schema:
            raise no_facts()
        return where.sql("lance", schema)[0]

    def _nearest(self, query: np.ndarray, k: int, condition: str | None) -> tuple[np.ndarray, np.ndarray]:
        search = self._table.search(query, vector_column_name=VECTOR).distance_type("dot").limit(k)
        search = search.nprobes(PROBES).refine_factor(REFINE).select([ID, "_distance"])
        if condition is not None:
            search = search.where(condition, prefilter=True)
        found = search.to_arrow()
        return 1 - found["_distance"].to_numpy(), found[ID].to_numpy()
