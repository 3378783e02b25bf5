"""The pgvector store: vectors and facts as columns of a PostgreSQL table."""

from __future__ import annotations

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
    split_name,
)
from clipadapt.search.where import kind_of

if TYPE_CHECKING:
    import pyarrow

    from clipadapt.search.where import Where

TABLE = "clipadapt"


class PgvectorStore:
    """A table of float16 vectors (halfvec); without `index`, every vector is compared.

    Each call is one transaction, on the disk when it returns.
    """

    def __init__(self, location: str, dim: int) -> None:
        """Connect to `postgresql://user@host/database#table`; libpq finds the password (PGPASSWORD, ~/.pgpass)."""
        import psycopg
        from pgvector.psycopg import register_vector

        dsn, self.table = split_name(location, TABLE)
        self.dim = dim
        try:
            self._connection = psycopg.connect(dsn, autocommit=True)
        except psycopg.Error as error:
            raise ClipadaptError(f"PostgreSQL cannot be reached: {_first_line(error)}") from None
        try:
            # Not "create extension if not exists", which asks for the right to create it even where it is there.
            if not self._one("select 1 from pg_extension where extname = 'vector'"):
                self._connection.execute("create extension vector")
            register_vector(self._connection)
            # Of use only where there is an index: it is walked on until enough rows fulfil a condition.
            self._connection.execute("set hnsw.iterative_scan = strict_order")
            self._connection.execute("set hnsw.ef_search = 100")
        except psycopg.Error as error:
            raise ClipadaptError(
                f"The database needs the extension vector (pgvector 0.8 or newer): {_first_line(error)}"
            ) from None
        width = self._one(
            "select atttypmod from pg_attribute where attrelid = to_regclass(%s) and attname = %s",
            (self._name().as_string(), VECTOR),
        )
        if self._exists() and width != dim:
            held = "is none of this program" if width is None else f"holds vectors of width {width}, not {dim}"
            raise ArtifactError(f"The table {self.table!r} {held}; name another by #name.")

    def add(self, ids: np.ndarray, vectors: np.ndarray, facts: pyarrow.Table | None = None) -> None:
        import pyarrow
        from pgvector import HalfVector
        from psycopg import sql

        schema = self._schema()
        ids, vectors, facts = as_rows(ids, vectors, facts, self.dim, schema)
        if facts is None:
            facts = nulls(len(ids), schema) if schema is not None else pyarrow.table({})
        names = [ID, VECTOR, *facts.column_names]
        rows = zip(
            ids.tolist(),
            map(HalfVector, vectors.astype(np.float16)),
            *map(_values, facts.columns),
            strict=True,
        )
        columns = sql.SQL(", ").join(map(sql.Identifier, names))
        updates = sql.SQL(", ").join(
            sql.SQL("{0} = excluded.{0}").format(sql.Identifier(name)) for name in names if name != ID
        )
        with self._connection.transaction(), self._connection.cursor() as cursor:
            if schema is None:
                self._create(facts.schema)
            cursor.execute(
                sql.SQL("create temporary table clipadapt_new (like {}) on commit drop").format(self._name())
            )
            with cursor.copy(sql.SQL("copy clipadapt_new ({}) from stdin").format(columns)) as copy:
                for row in rows:
                    copy.write_row(row)
            cursor.execute(
                sql.SQL("insert into {} ({}) select {} from clipadapt_new on conflict ({}) do update set {}").format(
                    self._name(), columns, columns, sql.Identifier(ID), updates
                )
            )

    def delete(self, ids: np.ndarray) -> None:
        from psycopg import sql

        ids = as_ids(ids)
        if self._exists():
            command = sql.SQL("delete from {} where {} = any(%s)").format(self._name(), sql.Identifier(ID))
            self._connection.execute(command, (ids.tolist(),))

    def search(self, queries: np.ndarray, k: int, where: Where | None = None) -> tuple[np.ndarray, np.ndarray]:
        from pgvector import HalfVector
        from psycopg import sql

        queries = as_queries(queries, k, self.dim)
        if not self._exists():
            return answer([((), ())] * len(queries), k)
        condition, parameters = self._condition(where)
        command = sql.SQL(
            "select {id}, -({vector} <#> %s) from {table} where {where} order by {vector} <#> %s, {id} limit %s"
        ).format(id=sql.Identifier(ID), vector=sql.Identifier(VECTOR), table=self._name(), where=sql.SQL(condition))
        found = []
        for query in queries:
            vector = HalfVector(query)
            rows = self._connection.execute(command, (vector, *parameters, vector, k)).fetchall()
            found.append(([score for _, score in rows], [number for number, _ in rows]))
        return answer(found, k)

    def count(self) -> int:
        from psycopg import sql

        return self._one(sql.SQL("select count(*) from {}").format(self._name())) if self._exists() else 0

    def persist(self) -> None:
        pass

    def index(self) -> None:
        """Build HNSW, by which a search compares a part of the rows; pgvector does so up to a width of 4,000."""
        from psycopg import sql

        command = sql.SQL("create index on {} using hnsw ({} halfvec_ip_ops)")
        self._connection.execute(command.format(self._name(), sql.Identifier(VECTOR)))

    def _create(self, facts: pyarrow.Schema) -> None:
        from psycopg import sql

        columns = [sql.SQL("{} bigint primary key").format(sql.Identifier(ID))]
        columns.append(sql.SQL("{} halfvec({}) not null").format(sql.Identifier(VECTOR), sql.Literal(self.dim)))
        columns += [sql.SQL("{} {}").format(sql.Identifier(f.name), sql.SQL(_column_type(f.type))) for f in facts]
        self._connection.execute(sql.SQL("create table {} ({})").format(self._name(), sql.SQL(", ").join(columns)))

    def _schema(self) -> pyarrow.Schema | None:
        """Of the facts, from the types of the table's columns."""
        import pyarrow
        from psycopg import sql

        if not self._exists():
            return None
        found = self._connection.execute(sql.SQL("select * from {} limit 0").format(self._name())).description
        types = {
            "int8": pyarrow.int64(),
            "float8": pyarrow.float64(),
            "numeric": pyarrow.decimal128(38),
            "text": pyarrow.string(),
            "bool": pyarrow.bool_(),
            "date": pyarrow.date32(),
            "timestamp": pyarrow.timestamp("us"),
            "timestamptz": pyarrow.timestamp("us", "UTC"),
        }
        names = self._connection.adapters.types
        columns = [
            (c.name, types.get(getattr(names.get(c.type_code), "name", ""), pyarrow.binary())) for c in found or ()
        ]
        return facts_schema(pyarrow.schema(columns))

    def _condition(self, where: Where | None) -> tuple[str, list[Any]]:
        if where is None:
            return "true", []
        schema = self._schema()
        if not schema:
            raise no_facts()
        return where.sql("postgresql", schema)

    def _exists(self) -> bool:
        return self._one("select to_regclass(%s)", (self._name().as_string(),)) is not None

    def _name(self) -> Any:
        from psycopg import sql

        return sql.Identifier(self.table)

    def _one(self, command: Any, parameters: tuple[Any, ...] = ()) -> Any:
        """The first value of a query's first row; None if there is no row."""
        row = self._connection.execute(command, parameters).fetchone()
        return None if row is None else row[0]


def _column_type(type_: pyarrow.DataType) -> str:
    kind = kind_of(type_)
    if kind == "number":
        small = str(type_).startswith(("int", "uint")) and str(type_) != "uint64"
        return (
            "bigint" if small else "double precision" if str(type_) in ("halffloat", "float", "double") else "numeric"
        )
    if kind == "time":
        return "timestamp" if type_.tz is None else "timestamptz"
    return {"text": "text", "null": "text", "truth": "boolean", "date": "date"}.get(kind, "jsonb")


def _values(column: pyarrow.ChunkedArray) -> list[Any]:
    """A column's values as psycopg takes them."""
    import pyarrow
    from psycopg.types.json import Jsonb

    kind = kind_of(column.type)
    if kind == "time":
        column = column.cast(pyarrow.timestamp("us", column.type.tz), safe=False)
    values = column.to_pylist()
    if kind == "other":
        return [None if value is None else Jsonb(value) for value in values]
    return values


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
