"""Checks of the rows and queries given to every store, and the form of its answers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from clipadapt.errors import ClipadaptError
from clipadapt.search.where import without_nan

if TYPE_CHECKING:
    import pyarrow

ID, VECTOR = "__id", "__vector"  # columns next to the facts, in stores that keep everything in one table


def as_ids(ids: Any) -> np.ndarray:
    """Ids as int64 (n,); refuses what is below 0, as -1 means that nothing was found."""
    given = np.asarray(ids)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise ClipadaptError(f"ids must be whole numbers with shape (n,), not {given.dtype} {given.shape}.")
    given = given.astype(np.int64)
    if given.size and given.min() < 0:
        raise ClipadaptError(f"ids must be from 0 to 2^63 - 1, not {given.min()}.")
    return given


def as_rows(
    ids: Any, vectors: Any, facts: pyarrow.Table | None, dim: int, known: pyarrow.Schema | None
) -> tuple[np.ndarray, np.ndarray, pyarrow.Table | None]:
    """`add`'s arguments, checked: ids (n,) int64, vectors (n, dim) float32, facts in the order of `known`'s columns.

    `known` is the schema of the facts that the store has so far. Numbers in `facts` that are NaN become null.
    """
    ids = as_ids(ids)
    vectors = np.asarray(vectors, np.float32)
    if vectors.shape != (len(ids), dim):
        raise ClipadaptError(f"vectors must have shape ({len(ids)}, {dim}), one for each id, not {vectors.shape}.")
    if not np.isfinite(vectors).all():
        raise ClipadaptError("vectors hold values that are not finite.")
    if len(np.unique(ids)) < len(ids):
        values, counts = np.unique(ids, return_counts=True)
        raise ClipadaptError(f"ids hold {values[counts > 1][0]} more than once.")
    if facts is None:
        return ids, vectors, None
    if facts.num_rows != len(ids):
        raise ClipadaptError(f"facts must have {len(ids)} rows, one for each id, not {facts.num_rows}.")
    if len({*facts.column_names, ID, VECTOR}) < facts.num_columns + 2:
        raise ClipadaptError(
            f"facts must have columns of different names, none of them {ID} or {VECTOR}, not "
            f"{', '.join(facts.column_names)}."
        )
    for place, name in enumerate(facts.column_names):
        facts = facts.set_column(place, name, without_nan(facts[name]))
    if known is not None:
        if set(facts.column_names) != set(known.names):
            has = ", ".join(known.names) or "none"
            raise ClipadaptError(f"facts have the columns {', '.join(facts.column_names)}, and this store has {has}.")
        facts = facts.select(known.names)
    return ids, vectors, facts


def as_queries(queries: Any, k: int, dim: int) -> np.ndarray:
    """Queries as float32 (Q, dim); refuses k below 1."""
    queries = np.ascontiguousarray(queries, np.float32)
    if queries.ndim != 2 or queries.shape[1] != dim:
        raise ClipadaptError(f"queries must have shape (Q, {dim}), not {queries.shape}.")
    if not np.isfinite(queries).all():
        raise ClipadaptError("queries hold values that are not finite.")
    if k < 1:
        raise ClipadaptError(f"k must be at least 1, not {k}.")
    return queries


def nulls(count: int, schema: pyarrow.Schema) -> pyarrow.Table:
    """Facts of rows without any."""
    import pyarrow

    return pyarrow.table([pyarrow.nulls(count, field.type) for field in schema], schema=schema)


def facts_schema(schema: pyarrow.Schema) -> pyarrow.Schema:
    """The schema of a whole table without the id and the vector."""
    import pyarrow

    return pyarrow.schema([field for field in schema if field.name not in (ID, VECTOR)])


def vector_array(vectors: np.ndarray) -> pyarrow.Array:
    """Vectors (n, D) as an Arrow column."""
    import pyarrow

    return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors.ravel()), vectors.shape[1])


def split_name(location: str, default: str) -> tuple[str, str]:
    """`URL#name` -> (URL, name); the default name if there is none."""
    url, _, name = location.rpartition("#")
    return (url, name) if re.fullmatch(r"[A-Za-z_][\w-]*", name) and url else (location, default)


def no_facts() -> ClipadaptError:
    """The error for a condition where nothing is known of the rows."""
    return ClipadaptError("This store has vectors only, so conditions cannot be tested; add facts to it.")


def answer(found: list[tuple[Any, Any]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """For each of Q queries the scores and ids of at most k rows -> scores (Q, k) and ids (Q, k), best first.

    Ties are ordered by id; what is missing is -inf and -1.
    """
    scores = np.full((len(found), k), -np.inf, np.float32)
    ids = np.full((len(found), k), -1, np.int64)
    for row, (some_scores, some_ids) in enumerate(found):
        order = np.lexsort((some_ids, -np.asarray(some_scores, np.float32)))
        scores[row, : len(order)] = np.asarray(some_scores, np.float32)[order]
        ids[row, : len(order)] = np.asarray(some_ids, np.int64)[order]
    return scores, ids
