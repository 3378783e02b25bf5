"""The store: rows come back exactly or not at all, whatever happens to its files."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest

from clipadapt.errors import ClipadaptError
from clipadapt.features import store as store_module
from clipadapt.features.store import FeatureStore


def rows(start: int, count: int, dim: int = 4) -> tuple[list[bytes], np.ndarray]:
    keys = [number.to_bytes(16, "big") for number in range(start, start + count)]
    return keys, np.random.default_rng(start).normal(size=(count, dim)).astype(np.float32)


def fill(folder, start: int, count: int) -> tuple[list[bytes], np.ndarray]:
    keys, features = rows(start, count)
    with FeatureStore(folder) as store:
        store.add(keys, features)
    return keys, features


def lookup(folder, keys):
    store = FeatureStore(folder)
    return [None if (row := store.get(key)) is None else row.tolist() for key in keys]


def parts(folder):
    return sorted(folder.glob("*.safetensors"))


def test_rows_come_back_in_this_and_in_later_stores(tmp_path):
    keys, features = fill(tmp_path, 0, 3)
    fill(tmp_path, 10, 2)
    store = FeatureStore(tmp_path)
    assert [store.get(key).tolist() for key in keys] == features.tolist()
    assert store.get(rows(11, 1)[0][0]) is not None
    assert store.get(b"x" * 16) is None


def test_rows_are_views_of_the_file(tmp_path):
    keys, _ = fill(tmp_path, 0, 3)
    row = FeatureStore(tmp_path).get(keys[1])
    assert not row.flags.owndata
    assert not row.flags.writeable


def test_rows_are_written_when_a_part_is_full_or_old_or_the_work_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "PART_ROWS", 4)
    store = FeatureStore(tmp_path)
    store.add(*rows(0, 3))
    assert parts(tmp_path) == []
    store.add(*rows(3, 1))
    assert len(parts(tmp_path)) == 1
    monkeypatch.setattr(store_module, "PART_SECONDS", 0.0)
    store.add(*rows(4, 1))
    assert len(parts(tmp_path)) == 2
    monkeypatch.setattr(store_module, "PART_SECONDS", 99.0)
    store.add(*rows(5, 1))
    with pytest.raises(KeyboardInterrupt), store:
        raise KeyboardInterrupt
    assert len(parts(tmp_path)) == 3


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_damage_anywhere_in_a_part_is_found_and_heals(tmp_path, damage):
    keys, _ = fill(tmp_path / "whole", 0, 3)
    whole = parts(tmp_path / "whole")[0].read_bytes()
    folder = tmp_path / "damaged"
    folder.mkdir()
    for position in range(len(whole)):
        flipped = whole[:position] + bytes([whole[position] ^ 1 << position % 8]) + whole[position + 1 :]
        (folder / "part.safetensors").write_bytes(flipped if damage == "flip" else whole[:position])
        with pytest.warns(RuntimeWarning, match=r"part.safetensors is damaged"):
            assert lookup(folder, keys) == [None] * 3, position
        assert parts(folder) == []  # so that it is reported once


def test_only_the_damaged_part_is_lost(tmp_path):
    lost_keys, _ = fill(tmp_path, 0, 3)
    path = parts(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    kept_keys, kept = fill(tmp_path, 10, 3)
    store = FeatureStore(tmp_path)
    with pytest.warns(RuntimeWarning, match="its 3 images are encoded again"):
        assert store.get(lost_keys[0]) is None
    assert [store.get(key) for key in lost_keys] == [None] * 3
    assert [store.get(key).tolist() for key in kept_keys] == kept.tolist()


def test_many_small_parts_are_joined(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "MAX_SMALL_PARTS", 5)
    filled = [fill(tmp_path, number, 1) for number in range(23)]
    assert len(parts(tmp_path)) <= 6
    store = FeatureStore(tmp_path)
    assert all(store.get(keys[0]).tolist() == features[0].tolist() for keys, features in filled)


def test_parts_that_vanish_or_appear_meanwhile_do_no_harm(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "MAX_SMALL_PARTS", 3)
    written = []

    def write(first: int) -> None:
        for number in range(first, first + 40):
            written.append(fill(tmp_path, number, 1))

    threads = [threading.Thread(target=write, args=(1000 * writer,)) for writer in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) == 120
    store = FeatureStore(tmp_path)
    assert all(store.get(keys[0]).tolist() == features[0].tolist() for keys, features in written)


def test_what_a_killed_process_left_is_removed_once_it_is_old(tmp_path):
    old, young = tmp_path / ".a.tmp", tmp_path / ".b.tmp"
    for path in (old, young):
        path.write_bytes(b"half a part")
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    FeatureStore(tmp_path)
    assert not old.exists()
    assert young.exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ClipadaptError, match="CLIPADAPT_CACHE"):
        FeatureStore(tmp_path / "file" / "features")
