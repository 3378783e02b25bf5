"""Parts are the same whoever makes them, and what goes wrong with one spoils only that one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tarfile
import time
from functools import partial
from pathlib import Path

import pytest

from clipadapt.embeddings import Embeddings, encode_shard
from clipadapt.embeddings.executors import Job, encode_shards, shards_of
from clipadapt.embeddings.format import parts_in
from clipadapt.embeddings.listing import Files, list_images
from clipadapt.errors import ArtifactError
from tests.features.conftest import CountingBackbone, write_images


class Doomed(CountingBackbone):
    """Its process is killed at the fifth batch of its first part, as long as a file `doom` is there."""

    def __init__(self, doom: Path) -> None:
        super().__init__()
        self.doom = doom

    def encode_images(self, pixels):
        if len(self.batch_sizes) == 4 and claim(self.doom.unlink):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_images(pixels)


class Held(CountingBackbone):
    """As long as a folder `held` is there, only one part is made, in four batches; all other work waits."""

    def __init__(self, held: Path) -> None:
        super().__init__()
        self.held, self.first = held, None

    def encode_images(self, pixels):
        if self.first is None:
            self.first = claim((self.held / "first").mkdir)
        while self.held.exists() and not (self.first and len(self.batch_sizes) < 4):
            time.sleep(0.01)
        return super().encode_images(pixels)


def claim(change) -> bool:
    """Whether this process is the one that could make a change that only one can make."""
    try:
        change()
    except OSError:
        return False
    return True


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def job(paths, tmp_path):
    """Four parts of 30 images."""
    return Job(CountingBackbone, Files(paths), str(tmp_path / "out"), 4, {"batch_size": 2})


def test_processes_make_the_parts_that_one_would_even_after_a_stop(job, tmp_path, paths):
    def stop(line):
        raise KeyboardInterrupt

    held = tmp_path / "held"
    held.mkdir()
    # A worker is killed where it waits: killed while it writes a part, it would leave hidden files behind.
    with pytest.raises(KeyboardInterrupt):
        encode_shards(Job(partial(Held, held), job.listing, job.out, 4, job.options), jobs=2, tell=stop)
    assert not multiprocessing.active_children(), "no worker is left behind"
    made_before = {shard for shard, _ in parts_in(job.out)}
    assert len(made_before) == 1

    told: list[str] = []
    rows = encode_shards(job, jobs=2, tell=told.append)
    assert rows == [
        {"shard": shard, "done": True} if shard in made_before else {"shard": shard, "rows": size, "skipped": 0}
        for shard, size in enumerate([7, 8, 7, 8])
    ]
    assert sorted(told) == [f"shard {row['shard']} of 4: {row['rows']} images" for row in rows if "rows" in row]

    encode_shards(Job(job.load, job.listing, str(tmp_path / "alone"), 4, job.options))
    for shard in range(4):
        encode_shards(Job(job.load, job.listing, str(tmp_path / "one"), 4, job.options), only=shard)
        encode_shard(CountingBackbone(), paths, tmp_path / "by hand", (shard, 4), batch_size=2)
    expected = content(tmp_path / "out")
    assert len(expected) == 12
    for other in ("alone", "one", "by hand"):
        assert content(tmp_path / other) == expected


def test_what_is_done_is_not_done_again(job, tmp_path):
    encode_shards(job)
    tower = CountingBackbone()
    (tmp_path / "out/part-00002-of-00004.json").unlink()
    rows = encode_shards(job, tower=tower)
    assert [row.get("done") for row in rows] == [True, True, None, True]
    assert tower.seen == 7
    assert encode_shards(job, jobs=2, tower=tower) == [{"shard": shard, "done": True} for shard in range(4)]


def test_a_killed_worker_and_an_unreadable_image_spoil_only_their_parts(job, paths, tmp_path):
    doom = tmp_path / "doom"
    doom.touch()
    listing = Files([*paths, str(tmp_path / "missing.png")])  # in the last part
    doomed = Job(partial(Doomed, doom), listing, job.out, 5, {"batch_size": 1})
    rows = encode_shards(doomed, jobs=2)
    failed = {row["error"]: row["shard"] for row in rows if "error" in row}
    unreadable = f"{tmp_path / 'missing.png'} cannot be read: No such file or directory."
    assert failed.keys() == {"its process ended (exit code -9), perhaps out of memory", unreadable}
    assert failed[unreadable] == 4
    assert sum("rows" in row for row in rows) == 3
    with pytest.raises(ArtifactError, match=rf"part {min(failed.values())}, 4 of 5 is not done yet"):
        Embeddings(job.out)

    Path(tmp_path / "missing.png").write_bytes(Path(paths[0]).read_bytes())
    rows = encode_shards(doomed)
    assert {row["shard"] for row in rows if "rows" in row} == set(failed.values())
    Embeddings(job.out).check()
    encode_shards(Job(CountingBackbone, listing, str(tmp_path / "alone"), 5, {"batch_size": 1}))
    assert content(Path(job.out)) == content(tmp_path / "alone")


def test_a_damaged_tar_spoils_only_its_part(tmp_path):
    image = write_images(tmp_path, 1)[0]
    for number in range(3):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as archive:
            archive.add(image, "a.png")
    (tmp_path / "1.tar").write_bytes(b"x" * 10240)
    job = Job(CountingBackbone, list_images(tmp_path / "*.tar"), str(tmp_path / "out"), 3)
    rows = encode_shards(job)
    assert [row.get("rows") for row in rows] == [1, None, 1]
    assert "1.tar cannot be read as an uncompressed tar file" in rows[1]["error"]


def test_a_folder_that_was_begun_otherwise_is_refused(job, paths, tmp_path):
    encode_shards(job, only=0)
    for other, what in [
        (Job(CountingBackbone, Files(paths[1:]), job.out, 4), "another list of images"),
        (Job(partial(CountingBackbone, 1), job.listing, job.out, 4), "another model"),
        (Job(CountingBackbone, job.listing, job.out, 5), "another number of shards"),
        (Job(CountingBackbone, job.listing, job.out, 4, {"fast_decode": True}), "other choice of fast_decode"),
    ]:
        with pytest.raises(ArtifactError, match=rf"out was made .*{what}"):
            encode_shards(other, only=1)
    assert shards_of(job.listing, job.out) == 4, "a folder that was begun says into how many"
    assert shards_of(job.listing, str(tmp_path / "new")) == 1
    assert shards_of(job.listing, job.out, 7) == 7
