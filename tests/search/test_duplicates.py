"""Copies are found, chains do not sweep away what differs, and the largest image stays."""

from __future__ import annotations

import shutil
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from clipadapt.embeddings import Embeddings, encode_shard
from clipadapt.errors import ClipadaptError
from clipadapt.search import duplicates, near_duplicates


class Known:
    """What `near_duplicates` needs of embeddings, made of given vectors."""

    def __init__(self, vectors, digests=None, **columns):
        import pyarrow

        self.matrix = np.asarray(vectors, np.float16)
        names = [f"{row:03}.png" for row in range(len(self.matrix))]
        self.table = pyarrow.table({"name": names, "digest": digests or names, **columns})

    def __len__(self):
        return len(self.matrix)

    def blocks(self, rows):
        return ((first, self.matrix[first : first + rows]) for first in range(0, len(self), rows))

    def rows(self, numbers):
        return self.matrix[numbers]


def at(*degrees):
    angles = np.deg2rad(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def test_a_copied_a_resized_and_an_unrelated_image(embedded, drawn, tmp_path):
    first, second = drawn[0], drawn[1]
    copied = shutil.copy(first, tmp_path / "copied.png")
    large = str(tmp_path / "large.png")
    with Image.open(first) as image:
        image.resize((160, 160)).save(large)
    encode_shard(embedded, [first, str(copied), large, second], tmp_path / "emb")
    (group,) = near_duplicates(Embeddings(tmp_path / "emb"), 0.95)
    assert [(kept.name, kept.why) for kept in group.keep] == [(large, "most pixels")]
    assert {(copy.name, copy.same_content) for copy in group.copies} == {(first, False), (str(copied), False)}
    assert all(copy.like == 2 and copy.similarity >= 0.95 for copy in group.copies)


@pytest.mark.parametrize("rows", [1, 7, 4096])
@pytest.mark.parametrize("pending", [0, 1 << 22])
def test_groups_are_what_links_connect(rows, pending, monkeypatch):
    monkeypatch.setattr(duplicates, "_ROWS", rows)
    monkeypatch.setattr(duplicates, "_PENDING", pending)
    vectors = np.random.default_rng(0).normal(size=(60, 3))
    known = Known(vectors, digests=[f"{row % 50}" for row in range(60)])
    unit = known.matrix.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    groups = {row: {row} for row in range(60)}
    for i, j in combinations(range(60), 2):
        if (unit[i] @ unit[j] >= 0.97 or i % 50 == j % 50) and groups[i] is not groups[j]:
            groups[i] |= groups[j]
            for row in groups[j]:
                groups[row] = groups[i]
    expected = {frozenset(group) for group in groups.values() if len(group) > 1}
    found = near_duplicates(known, 0.97)
    assert {frozenset(entry.row for entry in (*g.keep, *g.copies)) for g in found} == expected
    assert len(expected) > 3
    for group in found:  # a copy is like what it is said to be like, and kept ones are not like one another
        for copy in group.copies:
            assert copy.same_content == (copy.row % 50 == copy.like % 50)
            assert copy.same_content or copy.similarity == pytest.approx(unit[copy.row] @ unit[copy.like], abs=1e-5)
            assert copy.similarity >= 0.97 - 1e-5
        for one, other in combinations(group.keep, 2):
            assert unit[one.row] @ unit[other.row] < 0.97


def test_the_ends_of_a_chain_are_both_kept():
    (group,) = near_duplicates(Known(at(0, 10, 20, 30)), np.cos(np.deg2rad(11)))
    assert [kept.row for kept in group.keep] == [0, 2]
    assert [(copy.row, copy.like) for copy in group.copies] == [(1, 0), (3, 2)]


def test_the_largest_is_kept():
    known = Known(at(0, 0, 0), width=[10, 20, None], height=[10, 20, None])
    (group,) = near_duplicates(known, 1)
    assert [(kept.row, kept.why) for kept in group.keep] == [(1, "most pixels")]
    (group,) = near_duplicates(Known(at(0, 0)), 1)
    assert [(kept.row, kept.why) for kept in group.keep] == [(0, "as large as others, first by name")]


def test_a_file_is_no_copy_of_itself(embedded, drawn, tmp_path):
    (tmp_path / "link.png").symlink_to(drawn[0])
    encode_shard(embedded, [drawn[0], drawn[0], str(tmp_path / "link.png"), drawn[1]], tmp_path / "emb")
    assert near_duplicates(Embeddings(tmp_path / "emb"), 0.99) == []


def test_nothing_to_find():
    assert near_duplicates(Known(at(0, 90, 180)), 0.9) == []
    for threshold in (0, 1.5, float("nan")):
        with pytest.raises(ClipadaptError, match=r"a cosine in \(0, 1\]"):
            near_duplicates(Known(at(0)), threshold)
