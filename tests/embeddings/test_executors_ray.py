"""A Ray cluster makes the parts that this process makes; an actor that dies spoils only its part. Needs `[ray]`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from clipadapt.embeddings.executors import Job, encode_shards
from clipadapt.embeddings.listing import Files
from clipadapt.errors import ClipadaptError
from tests.embeddings.test_executors import Doomed, content
from tests.features.conftest import CountingBackbone
from tests.ray_cluster import TOKEN

ray = pytest.importorskip("ray")


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)


def test_same_parts_and_a_dead_actor_spoils_one(paths, tmp_path):
    doom, options = tmp_path / "doom", {"batch_size": 1}
    doom.touch()
    job = Job(partial(Doomed, doom), Files(paths), str(tmp_path / "out"), 4, options)
    rows = encode_shards(job, jobs=2, ray="local")
    assert not ray.is_initialized(), "what was started is stopped"
    assert sum("rows" in row for row in rows) == 3
    (error,) = (row["error"] for row in rows if "error" in row)
    assert "ActorDiedError" in error
    assert sum("rows" in row for row in encode_shards(job, jobs=2, ray="local")) == 1
    encode_shards(Job(CountingBackbone, job.listing, str(tmp_path / "alone"), 4, options))
    assert content(Path(job.out)) == content(tmp_path / "alone")


def test_no_cluster_at_the_address(paths, tmp_path):
    with pytest.raises(ClipadaptError, match="cannot be reached at 'auto'"):
        encode_shards(Job(CountingBackbone, Files(paths), str(tmp_path / "out"), 4), ray="auto")
