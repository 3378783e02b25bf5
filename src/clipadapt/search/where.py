"""Conditions on the facts about images, written as `syntax` says, for tables, SQL and Qdrant: for every store."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from clipadapt.errors import ClipadaptError, unknown_name
from clipadapt.search.syntax import Junction, Test, Value, parse

if TYPE_CHECKING:
    import pyarrow


@dataclass(frozen=True)
class Where:
    """A condition that was read: it is true or false of every row of a table of facts."""

    text: str
    tree: Test | Junction  # negations are pushed down into the tests

    @classmethod
    def parse(cls, text: str) -> Where:
        """Read a condition; raises `ClipadaptError` that names the place and what was expected there."""
        return cls(text, parse(text))

    def check(self, schema: pyarrow.Schema) -> None:
        """Raise `ClipadaptError` for a column that is not in `schema`, or that cannot be compared with its value."""
        for test in _tests(self.tree):
            if test.column not in schema.names:
                raise unknown_name("column", test.column, schema.names)
            _convert(test, schema.field(test.column).type)

    def mask(self, table: pyarrow.Table) -> np.ndarray:
        """Which of the n rows fulfil it: (n,) bool; raises as `check` does."""
        self.check(table.schema)
        return _mask(self.tree, table)

    def sql(self, dialect: Literal["lance", "postgresql"], schema: pyarrow.Schema) -> tuple[str, list[Value]]:
        """The condition in SQL and its parameters, in the order of their `%s`; raises as `check` does.

        Args:
            dialect: "lance" has no parameters, so values are escaped in the text; "postgresql" binds them all.
            schema: of the facts; it decides how values are written.
        """
        self.check(schema)
        parameters: list[Value] = []
        return _sql(self.tree, dialect, schema, parameters), parameters

    def qdrant(self, schema: pyarrow.Schema) -> Any:
        """As `qdrant_client.models.Filter`; raises as `check` does, and for what Qdrant cannot express."""
        self.check(schema)
        return _qdrant(self.tree, schema)


def _tests(tree: Test | Junction) -> list[Test]:
    if isinstance(tree, Test):
        return [tree]
    return [test for part in tree.parts for test in _tests(part)]


# -- types -------------------------------------------------------------------------------------------------------------


_HELD = {"number": "numbers", "text": "text", "truth": "true or false", "date": "dates", "time": "times"}


def kind_of(type_: pyarrow.DataType) -> str:
    """What values of a column are: number, text, truth, date, time, null (no value at all), or other."""
    from pyarrow import types

    if types.is_dictionary(type_):
        return kind_of(type_.value_type)
    for kind, tests in {
        "number": (types.is_integer, types.is_floating, types.is_decimal),
        "text": (types.is_string, types.is_large_string, types.is_string_view),
        "truth": (types.is_boolean,),
        "date": (types.is_date,),
        "time": (types.is_timestamp,),
        "null": (types.is_null,),
    }.items():
        if any(test(type_) for test in tests):
            return kind
    return "other"


def _convert(test: Test, type_: pyarrow.DataType) -> tuple[Value, ...]:
    """The test's values converted to the column's type; raises `ClipadaptError` if they cannot be compared."""
    column, operator, values = test
    kind = kind_of(type_)
    if not values or kind == "null":
        return values
    if kind == "other":
        raise ClipadaptError(f"The column {column!r} holds {type_}, which can only be tested by is null.")
    if operator.endswith("like") and kind != "text":
        raise ClipadaptError(f"The column {column!r} holds {_HELD[kind]}, but like needs text.")
    if kind == "truth" and operator[0] in "<>":
        raise ClipadaptError(f"The column {column!r} holds true or false, which {operator} cannot compare.")
    if kind in ("date", "time"):
        return tuple(_moment(column, value, type_) for value in values)
    fitting: Any = {"number": int | float, "text": str, "truth": bool}[kind]
    for value in values:
        if not isinstance(value, fitting) or (kind == "number" and isinstance(value, bool)):
            raise ClipadaptError(f"The column {column!r} holds {_HELD[kind]}, and {value!r} is not.")
    return values


def _moment(column: str, value: Value, type_: pyarrow.DataType) -> date | datetime:
    """A date, or for a column of times a datetime, in UTC where the column has a time zone."""
    kind = kind_of(type_)
    try:
        if kind == "date":
            return date.fromisoformat(value)  # type: ignore[arg-type]
        moment = datetime.fromisoformat(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        form = "'2020-01-31'" if kind == "date" else "'2020-01-31' or '2020-01-31 18:30'"
        raise ClipadaptError(f"The column {column!r} holds {_HELD[kind]}; write {form}, not {value!r}.") from None
    if type_.tz is None:
        return moment if moment.tzinfo is None else moment.astimezone(UTC).replace(tzinfo=None)
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


# -- a table -----------------------------------------------------------------------------------------------------------


def _mask(tree: Test | Junction, table: pyarrow.Table) -> np.ndarray:
    if isinstance(tree, Junction):
        join = np.logical_and if tree.word == "and" else np.logical_or
        return join.reduce([_mask(part, table) for part in tree.parts])
    import pyarrow
    from pyarrow import compute

    operator, values = tree.operator, _convert(tree, table[tree.column].type)
    column = _comparable(table[tree.column], values)
    if operator.endswith("null"):
        known = compute.is_valid(column).to_numpy()
        return known if operator == "is not null" else ~known
    if pyarrow.types.is_null(column.type):
        return np.zeros(len(column), bool)
    if operator.endswith("like"):
        found = compute.match_like(column, values[0])
    elif operator.endswith("in"):
        equal = [compute.equal(column, _scalar(value, column.type)) for value in values]
        found = equal[0]
        for other in equal[1:]:
            found = compute.or_kleene(found, other)
    else:
        named = {
            "=": "equal",
            "!=": "not_equal",
            "<": "less",
            ">": "greater",
            "<=": "less_equal",
            ">=": "greater_equal",
        }
        found = compute.call_function(named[operator], [column, _scalar(values[0], column.type)])
    if operator.startswith("not"):
        found = compute.invert(found)
    return compute.fill_null(found, False).to_numpy()


def _comparable(column: pyarrow.ChunkedArray, values: tuple[Value, ...]) -> pyarrow.ChunkedArray:
    """The column in a type that Arrow compares with these values."""
    import pyarrow
    from pyarrow import types

    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if types.is_float16(column.type):
        column = column.cast(pyarrow.float32())
    elif types.is_string_view(column.type):
        column = column.cast(pyarrow.string())
    elif types.is_integer(column.type) and any(isinstance(value, float) for value in values):
        column = column.cast(pyarrow.float64(), safe=False)
    elif types.is_uint64(column.type):
        column = column.cast(pyarrow.decimal128(20))
    return without_nan(column)


def _scalar(value: Value, type_: pyarrow.DataType) -> Any:
    import pyarrow

    # A number keeps its own type: an integer column can be compared with 2.5. Moments take the column's unit.
    return pyarrow.scalar(value) if isinstance(value, bool | int | float | str) else pyarrow.scalar(value, type_)


def without_nan(column: pyarrow.ChunkedArray) -> pyarrow.ChunkedArray:
    """The column with null for what is not a number; databases do not agree on how that compares."""
    import pyarrow
    from pyarrow import compute

    if not pyarrow.types.is_floating(column.type):
        return column
    return compute.if_else(compute.is_nan(column), pyarrow.scalar(None, column.type), column)


# -- SQL ---------------------------------------------------------------------------------------------------------------


def _sql(tree: Test | Junction, dialect: str, schema: pyarrow.Schema, parameters: list[Value]) -> str:
    if isinstance(tree, Junction):
        return "(" + f" {tree.word} ".join(_sql(part, dialect, schema, parameters) for part in tree.parts) + ")"
    type_ = schema.field(tree.column).type
    operator, values = tree.operator, _convert(tree, type_)
    column = _lance_column(tree.column) if dialect == "lance" else '"' + tree.column.replace('"', '""') + '"'
    if operator.endswith("null"):
        return f"{column.replace('%', '%%') if dialect == 'postgresql' else column} {operator}"
    if kind_of(type_) == "null":
        return "false"
    if dialect == "lance":
        wanted = _lance_type(type_, values)
        if wanted != str(type_):  # or LanceDB would round the number to the column's type
            column = f"cast({column} as {wanted})"
        written = [_lance_value(value) for value in values]
    else:
        column = column.replace("%", "%%")  # psycopg reads the text for its parameters
        if kind_of(type_) == "text" and operator[0] in "<>":
            column += ' collate "C"'  # by code points, as everywhere else
        parameters += values
        written = ["%s"] * len(values)
    return f"{column} {operator} " + (f"({', '.join(written)})" if operator.endswith("in") else written[0])


def _lance_column(name: str) -> str:
    if "`" in name or "." in name:
        raise ClipadaptError(f"LanceDB cannot name the column {name!r} in a condition; rename it.")
    return f"`{name}`"


def _lance_type(type_: pyarrow.DataType, values: tuple[Value, ...]) -> str:
    """The type in which numbers are compared exactly; other columns are compared as they are."""
    name = str(type_)
    if kind_of(type_) != "number" or name.startswith("decimal"):
        return name
    if not name.startswith(("int", "uint")) or any(isinstance(value, float) for value in values):
        return "double"
    return "decimal(20, 0)" if name == "uint64" else "int64" if name == "int64" else "bigint"


def _lance_value(value: Value) -> str:
    if isinstance(value, bool | int | float):
        return repr(value).lower()
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return f"{'timestamp' if isinstance(value, datetime) else 'date'} '{value}'"


# -- Qdrant ------------------------------------------------------------------------------------------------------------


def _qdrant(tree: Test | Junction, schema: pyarrow.Schema) -> Any:
    from qdrant_client import models

    if isinstance(tree, Junction):
        parts = [_qdrant(part, schema) for part in tree.parts]
        return models.Filter(must=parts) if tree.word == "and" else models.Filter(should=parts)
    type_ = schema.field(tree.column).type
    operator, values, key = tree.operator, _convert(tree, type_), _qdrant_key(tree.column)
    empty = models.IsEmptyCondition(is_empty=models.PayloadField(key=key))
    if operator == "is null":
        return models.Filter(must=[empty])
    if operator == "is not null":
        return models.Filter(must_not=[empty])
    if kind_of(type_) == "null":
        return models.Filter(must=[models.HasIdCondition(has_id=[])])
    if operator.endswith("like"):
        raise ClipadaptError(f"Qdrant has no like; test {tree.column!r} by =, != or in, or use another store.")
    if operator[0] in "<>":
        if kind_of(type_) == "text":
            raise ClipadaptError(
                f"Qdrant cannot order text; test {tree.column!r} by =, != or in, or use another store."
            )
        bound = {"<": "lt", "<=": "lte", ">": "gt", ">=": "gte"}[operator]
        return models.Filter(must=[models.FieldCondition(key=key, range=_qdrant_range(values[0], bound))])
    found: list[Any] = []
    for value in values:
        if isinstance(value, str | bool) or (isinstance(value, int) and str(type_).startswith(("int", "uint"))):
            found.append(models.FieldCondition(key=key, match=models.MatchValue(value=value)))
        else:
            found.append(models.FieldCondition(key=key, range=_qdrant_range(value, "gte", "lte")))
    if operator in ("=", "in"):
        return models.Filter(should=found)
    return models.Filter(must_not=[*found, empty])


def _qdrant_range(value: Value, *bounds: str) -> Any:
    from qdrant_client import models

    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day, tzinfo=UTC)
    range_: Any = models.DatetimeRange if isinstance(value, datetime) else models.Range
    return range_(**dict.fromkeys(bounds, value))


def _qdrant_key(name: str) -> str:
    if '"' in name:
        raise ClipadaptError(f"Qdrant cannot name the column {name!r} in a condition; rename it.")
    return name if re.fullmatch(r"\w+", name) else f'"{name}"'
