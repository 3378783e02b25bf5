"""Conditions: what they select is what SQLite selects, and what is wrong with one is said with its place."""

from __future__ import annotations

import datetime
import random
import sqlite3
from decimal import Decimal

import numpy as np
import pyarrow
import pytest

from clipadapt.errors import ClipadaptError
from clipadapt.search.where import Where

ROWS = 40
_random = random.Random(0)


def _some(values):
    """One of the values in each row, or nothing."""
    return [_random.choice([*values, None]) for _ in range(ROWS)]


TABLE = pyarrow.table(
    {
        "year": pyarrow.array(_some([-3, 0, 2019, 2020, 2021]), pyarrow.int64()),
        "small": pyarrow.array(_some([0, 5, 100]), pyarrow.int8()),
        "score": pyarrow.array(_some([-1.5, 0.0, 0.25, 2020.0])),
        "folder": _some(["beach", "Beach", "it's 100%", "", "höhle_1"]),
        'my "odd" column': _some(["and", "x"]),
        "seen": _some([True, False]),
        "day": _some([datetime.date(2019, 12, 31), datetime.date(2020, 1, 31)]),
        "taken": _some([datetime.datetime(2020, 1, 31), datetime.datetime(2020, 1, 31, 18, 30)]),
    }
)
CONDITIONS = [
    "year > 2019",
    "year != 2020",
    "not year = 2020",
    "year <> 2020 AND year IS NOT NULL",
    "year >= -3 and year < 2019.5 or score = .25",
    "year in (2019, 2021, 5)",
    "year not in (2019) and not small in (5, 2.5)",
    "small <= 300 and small > 1e0",
    "score in (0, 0.25)",
    "folder = 'beach' or folder = 'it''s 100%' or folder = ''",
    "folder like 'b%' or folder like '%e_1' or folder like '%s 100%'",
    "folder not like '%each'",
    "folder > 'Z' and folder <= 'c'",
    '"my ""odd"" column" = \'and\'',
    "seen = true or seen != true and year is null",
    "seen in (false)",
    "day > '2019-12-31'",
    "day in ('2019-12-31', '2020-01-01')",
    "not (day is null or (year = 2020 and not seen = false))",
    "not not (year < 2020 and (folder is null or score >= 0))",
    "year = 2019 or year = 2020 and seen = true",
]


def selected_by_sqlite(table: pyarrow.Table, condition: str) -> list[int]:
    database = sqlite3.connect(":memory:")
    database.execute("pragma case_sensitive_like = on")
    names = ['"' + name.replace('"', '""') + '"' for name in table.column_names]
    database.execute(f"create table facts (number, {', '.join(names)})")
    values = [[str(v) if isinstance(v, datetime.date) else v for v in row.values()] for row in table.to_pylist()]
    database.executemany(
        f"insert into facts values ({', '.join('?' * (1 + len(names)))})",
        [(number, *row) for number, row in enumerate(values)],
    )
    found = database.execute(f"select number from facts where {condition} order by number").fetchall()
    return [number for (number,) in found]


def selected(condition: str, table: pyarrow.Table = TABLE) -> list[int]:
    mask = Where.parse(condition).mask(table)
    assert mask.shape == (table.num_rows,)
    assert mask.dtype == bool
    return np.flatnonzero(mask).tolist()


@pytest.mark.parametrize("condition", CONDITIONS)
def test_selects_what_sql_selects(condition):
    expected = selected_by_sqlite(TABLE, condition)
    assert selected(condition) == expected
    assert 0 < len(expected) < ROWS


def test_nested_conditions_select_what_sql_selects():
    draw = random.Random(1)

    def condition(depth: int) -> str:
        if depth == 0 or draw.random() < 0.2:
            return draw.choice(CONDITIONS)
        if draw.random() < 0.4:
            return f"not ({condition(depth - 1)})"
        return f"({condition(depth - 1)}) {draw.choice(['and', 'or'])} ({condition(depth - 1)})"

    for _ in range(100):
        text = condition(4)
        assert selected(text) == selected_by_sqlite(TABLE, text), text


def test_times_are_compared_as_moments():
    taken = TABLE["taken"].to_pylist()
    noon = datetime.datetime(2020, 1, 31, 12)
    expected = [row for row, value in enumerate(taken) if value is not None and value > noon]
    for text in ("taken > '2020-01-31 12:00'", "taken >= '2020-01-31T18:30:00'", "taken > '2020-01-31'"):
        assert selected(text) == expected
    zoned = TABLE.set_column(
        TABLE.column_names.index("taken"), "taken", TABLE["taken"].cast(pyarrow.timestamp("ns", "UTC"))
    )
    for text in ("taken > '2020-01-31 12:00'", "taken = '2020-01-31T20:30:00+02:00'"):
        assert selected(text, zoned) == expected


def test_columns_of_other_forms():
    table = pyarrow.table(
        {
            "kind": pyarrow.array(["a", "b", None]).dictionary_encode(),
            "ratio": [0.5, float("nan"), None],
            "tags": [["x"], [], None],
            "none": pyarrow.nulls(3),
            "half": pyarrow.array([0.5, float("nan"), None], pyarrow.float16()),
            "view": pyarrow.array(["a", "b", None], pyarrow.string_view()),
            "hash": pyarrow.array([5, 2**64 - 1, None], pyarrow.uint64()),
            "large": [2**53, 2**53 + 1, None],
            "price": pyarrow.array([Decimal("1.50"), Decimal("3.00"), None]),
        }
    )
    assert selected("kind != 'a'", table) == [1]
    assert selected("ratio != 0.1", table) == [0]  # NaN is as null
    assert selected("ratio is null", table) == [1, 2]
    assert selected("tags is not null", table) == [0, 1]
    assert selected("none = 3 or none != 3", table) == []
    assert selected("none is null", table) == [0, 1, 2]
    assert selected("half >= .5 and half < 1", table) == [0]
    assert selected("view like 'a%' or view > 'a'", table) == [0, 1]
    assert selected("hash > 9 and hash > -3", table) == selected("hash > 5.5", table) == [1]
    assert selected("large = 9007199254740993", table) == [1]
    assert selected("large > 0.5", table) == [0, 1]
    assert selected("price in (1.5, 2)", table) == [0]
    assert selected("ratio > 0", table.slice(0, 0)) == []
    with pytest.raises(ClipadaptError, match=r"'tags' holds list<.*is null"):
        selected("tags = 'x'", table)


@pytest.mark.parametrize(
    ("condition", "place", "what"),
    [
        ("", 1, "expected a column, not or (, found the end"),
        ("year", 5, "expected =, !="),
        ("year > and seen", 8, "expected a number, text in single quotes, true or false, found 'and'"),
        ("year > 2020 seen", 13, "expected and, or, or the end, found 'seen'"),
        ("year > 2020 and", 16, "found the end"),
        ("(year > 2020", 13, "expected ), found the end"),
        ("year > 2020)", 12, "found ')'"),
        ("year in 2020", 9, "expected (, found '2020'"),
        ("year in ()", 10, "expected a number"),
        ("year in (1,)", 12, "expected a number"),
        ("year = null", 8, "write: is null"),
        ("year is 5", 9, "expected null"),
        ("year not > 5", 10, "expected in or like"),
        ("folder like 5", 13, "a pattern in single quotes"),
        ("folder = 'beach", 10, "expected the closing quote of"),
        ('folder = "beach"', 10, "text in single quotes"),
        ("'beach' = folder", 1, "expected a column"),
        ("year == 2020", 7, "expected a number"),
        ("year > 2020; drop table facts", 12, "';"),
        ("year > 12abc", 8, "'12abc'"),
        ("year = 99999999999999999999", 8, "64 bits"),
        ("score = 1e999", 9, "64 bits"),
        ("folder = 'a\0b'", 10, "expected"),
    ],
)
def test_the_place_of_a_mistake_is_named(condition, place, what):
    with pytest.raises(ClipadaptError) as raised:
        Where.parse(condition)
    assert f"is wrong at character {place}: " in str(raised.value)
    assert what in str(raised.value)


@pytest.mark.parametrize(
    ("condition", "what"),
    [
        ("yeer > 2020", "Unknown column 'yeer'; did you mean 'year'"),
        ("seen = true and nothing = 1", "Unknown column 'nothing'"),
        ("year = '2020'", "'year' holds numbers, and '2020' is not"),
        ("year = true", "'year' holds numbers"),
        ("folder = 5", "'folder' holds text"),
        ("seen = 1", "'seen' holds true or false"),
        ("seen > false", "holds true or false, which > cannot compare"),
        ("year like '2%'", "'year' holds numbers, but like needs text"),
        ("day > '31.1.2020'", "'day' holds dates; write '2020-01-31', not '31.1.2020'"),
        ("day > 2020", "write '2020-01-31', not 2020"),
        ("taken > 'noon'", "or '2020-01-31 18:30'"),
    ],
)
def test_what_a_column_cannot_be_compared_with_is_refused(condition, what):
    where = Where.parse(condition)
    for refused in (
        lambda: where.mask(TABLE),
        lambda: where.sql("lance", TABLE.schema),
        lambda: where.sql("postgresql", TABLE.schema),
        lambda: where.qdrant(TABLE.schema),
    ):
        with pytest.raises(ClipadaptError) as raised:
            refused()
        assert what in str(raised.value)


def test_depth_is_limited_and_length_is_not():
    for text in ("not " * 5000 + "year = 1", "(" * 5000):
        with pytest.raises(ClipadaptError, match="nested more than 100 levels deep"):
            Where.parse(text)
    assert selected(" or ".join(["year = 2020"] * 3000)) == selected("year = 2020")


def test_values_never_become_sql():
    hostile = "x'; drop table facts; --%s"
    where = Where.parse(f"""folder = '{hostile.replace("'", "''")}' and "my ""odd"" column" > 'a'""")
    text, parameters = where.sql("postgresql", TABLE.schema)
    assert text == '("folder" = %s and "my ""odd"" column" collate "C" > %s)'
    assert parameters == [hostile, "a"]
    text, parameters = where.sql("lance", TABLE.schema)
    assert text == """(`folder` = 'x''; drop table facts; --%s' and `my "odd" column` > 'a')"""
    assert parameters == []
    percent = pyarrow.schema({"a%s": pyarrow.int64(), "b`": pyarrow.int64(), "c.d": pyarrow.int64()})
    assert Where.parse('"a%s" is null').sql("postgresql", percent) == ('"a%%s" is null', [])
    for name in ("b`", "c.d"):
        with pytest.raises(ClipadaptError, match="LanceDB cannot name"):
            Where.parse(f'"{name}" = 1').sql("lance", percent)


def test_what_qdrant_cannot_express_is_said():
    for condition in ("folder like 'b%'", "folder < 'b'"):
        with pytest.raises(ClipadaptError, match=r"Qdrant .*'folder'.* another store"):
            Where.parse(condition).qdrant(TABLE.schema)
