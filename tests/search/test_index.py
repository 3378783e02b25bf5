"""Searching: right images, right facts; models that share embeddings and such that do not; builds that are whole."""

from __future__ import annotations

import datetime
import json
import shutil

import numpy as np
import pytest
import torch

from clipadapt.backbones import load_backbone
from clipadapt.data import image_list
from clipadapt.embeddings import Embeddings, encode_shard
from clipadapt.errors import ArtifactError, ClipadaptError
from clipadapt.features import encode_images
from clipadapt.methods import create
from clipadapt.search import Index, build_index, query_vector
from clipadapt.search import index as index_module
from tests.pictures import colours
from tests.search.conftest import COLOURS, PER_COLOUR
from tests.tiny import tiny_clip


def colours_of(hits):
    return [hit.name.split("/")[-2] for hit in hits]


@pytest.mark.parametrize("colour", COLOURS)
def test_words_find_images(emb, colour):
    index = Index.open(emb)
    (hits,) = index.search(query_vector(index.model, f"a {colour} star.")[None], k=4)
    assert colours_of(hits) == [colour] * 4
    assert [hit.rank for hit in hits] == [1, 2, 3, 4]
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_images_find_themselves_and_minus_avoids(emb, embedded, drawn):
    index = Index.open(emb, embedded)
    (hits,) = index.search(query_vector(embedded, images=drawn[4])[None], k=1)
    assert hits[0].name == drawn[4]
    assert hits[0].id == 4
    assert hits[0].score == pytest.approx(1, abs=1e-3)
    assert hits[0].facts["year"] == 2019
    assert "digest" not in hits[0].facts
    both = query_vector(embedded, ["a red star.", "a blue star."], minus=["a red star."])
    assert colours_of(index.search(both[None], k=3)[0]) == ["blue"] * 3


def test_equals_the_plain_computation(noise, counting):
    index = Index.open(noise, counting)
    queries = np.stack([query_vector(counting, text) for text in ("a", "b", "c")])
    scores = queries @ np.concatenate(index.embeddings.parts).astype(np.float32).T
    found = index.search(queries, k=7)
    assert [[hit.id for hit in hits] for hits in found] == np.argsort(-scores, axis=1)[:, :7].tolist()
    best = [[hit.score for hit in hits] for hits in found]
    np.testing.assert_allclose(best, -np.sort(-scores, axis=1)[:, :7], atol=1e-6)
    assert [hit.facts["number"] for hit in found[0]] == [hit.id for hit in found[0]]
    assert len(index.search(queries[:1], k=99)[0]) == len(index) == 30


def test_conditions_narrow_a_search(emb, embedded):
    index = Index.open(emb, embedded)
    (hits,) = index.search(query_vector(embedded, "a red star.")[None], k=20, where="year > 2020 and year != 2024")
    assert sorted(hit.facts["year"] for hit in hits) == [2021, 2022, 2023, *range(2025, 2015 + PER_COLOUR * 3)]
    assert index.search(query_vector(embedded, "a red star.")[None], where="year > 3000") == [[]]
    with pytest.raises(ClipadaptError, match=r"'yaer'.*'year'"):
        index.search(query_vector(embedded, "a red star.")[None], where="yaer > 3000")


def test_facts_are_json(counting, tmp_path):
    taken = [datetime.datetime(2020, 1, 31, 18, 30), None]
    columns = {"taken": taken, "size": [float("nan"), 1.5]}
    encode_shard(counting, np.zeros((2, 20, 20, 3), np.uint8), tmp_path, columns=columns)
    hits = Index.open(tmp_path, counting).hits(np.array([0, 1]), np.zeros(2))
    assert [hit.facts["taken"] for hit in hits] == ["2020-01-31T18:30:00", None]
    assert [hit.facts["size"] for hit in hits] == [None, 1.5]
    json.dumps([hit.facts for hit in hits], allow_nan=False)


# -- which model -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    return load_backbone(tiny_clip())


@pytest.fixture(scope="module")
def tiny_emb(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    encode_shard(tiny, colours(4, seed=5), folder)
    return folder


def test_a_model_that_changes_texts_reuses_the_embeddings(tiny, tiny_emb, tmp_path):
    model = create("coop", epochs=2, n_ctx=2).fit(tiny, colours(2, seed=1))
    index = Index.open(tiny_emb, model.save(tmp_path / "coop"))
    assert index.adapts_texts
    (hits,) = index.search(query_vector(index.model, "red")[None], k=16)
    features = torch.from_numpy(Embeddings(tiny_emb).rows(range(16)).astype(np.float32))
    expected = features @ model.encode_texts(["red"])[0].detach()
    np.testing.assert_allclose([hit.score for hit in hits], expected.sort(descending=True).values, atol=1e-5)
    assert not Index.open(tiny_emb, create("tip-adapter").fit(tiny, colours(2, seed=1))).adapts_texts


def test_a_model_that_changes_images_needs_its_own(tiny, tiny_emb, tmp_path):
    model = create("clip-lora", steps_per_shot=2, lr=1e-2).fit(tiny, colours(2, seed=1))
    saved = model.save(tmp_path / "lora")
    with pytest.raises(ArtifactError, match=r"clip-lora.*clipadapt embed PHOTOS --model"):
        Index.open(tiny_emb, saved)
    encode_shard(model.encoder, colours(4, seed=5), tmp_path / "emb", model=str(saved))
    index = Index.open(tmp_path / "emb")
    assert index.model.card.key == "clip-lora"  # found by itself
    assert len(index.search(query_vector(index.model, "red")[None], k=3)[0]) == 3
    shutil.rmtree(saved)
    with pytest.raises(ArtifactError, match="embedded with is not available"):
        _ = Index.open(tmp_path / "emb").model


def test_other_backbones_and_models_without_one_are_refused(emb, tiny):
    with pytest.raises(ArtifactError, match="encodes images differently"):
        Index.open(emb, tiny)
    head = create("gda-clip").fit_features(np.eye(4), [0, 1, 2, 3], np.eye(4))
    with pytest.raises(ArtifactError, match="no text tower"):
        Index.open(emb, head)


# -- classes ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cached(embedded, drawn):
    """A feature method that knows the three colours as classes of made-up names."""
    labels = [number % 3 for number in range(9)]
    return create("gda-clip").fit(embedded, image_list(drawn[:9], labels, ["alpha", "beta", "gamma"]))


def test_classes_of_feature_methods_are_found_even_where_probabilities_round_to_1(emb, cached, drawn, monkeypatch):
    monkeypatch.setattr(index_module, "_BLOCK", 4)
    index = Index.open(emb, cached)
    features = encode_images(cached.backbone_, drawn, precision="float16").features
    expected = cached.probabilities(cached.logits(features))[:, 1].numpy()
    np.testing.assert_allclose(index.class_scores("beta"), expected, atol=1e-5)
    hits = index.search_class("beta", k=15)
    exact = cached.logits(features).double().softmax(1)
    odds = exact[:, 1].log() - (exact[:, 0] + exact[:, 2]).log()
    assert [hit.id for hit in hits] == odds.argsort(descending=True).tolist()
    assert [hit.score for hit in hits] == index.class_scores("beta")[[hit.id for hit in hits]].tolist()
    assert colours_of(hits[:5]) == ["green"] * 5
    assert {hit.facts["year"] for hit in index.search_class("beta", k=99, where="year <= 2017")} == {2015, 2016, 2017}


def test_classes_need_an_adapted_model_that_has_them(emb, embedded, cached):
    with pytest.raises(ClipadaptError, match="is a backbone"):
        Index.open(emb, embedded).class_scores("cat")
    with pytest.raises(ClipadaptError, match="did you mean 'alpha'"):
        Index.open(emb, cached).search_class("alfa")


@pytest.mark.parametrize("queries", [np.zeros(192), np.zeros((1, 5)), np.full((1, 192), np.nan)])
def test_queries_that_do_not_fit(emb, queries):
    with pytest.raises(ClipadaptError, match=r"of shape \(Q, 192\)"):
        Index.open(emb).search(queries)
    with pytest.raises(ClipadaptError, match="k must be at least 1"):
        Index.open(emb).search(np.zeros((1, 192)), k=0)


# -- stores ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_steps(monkeypatch):
    """Stores get four rows at a time and are put on the disk after each."""
    monkeypatch.setattr(index_module, "_BLOCK", 4)
    monkeypatch.setattr(index_module, "_SECONDS", -1)


def ids_of(index, counting):
    return [hit.id for hit in index.search(query_vector(counting, "a")[None], k=10)[0]]


@pytest.mark.parametrize("kind", ["usearch", "lance"])
def test_stores_find_what_is_found_without(noise, counting, kind, small_steps):
    exact = ids_of(Index.open(noise, counting), counting)
    steps: list[int] = []
    assert build_index(noise, kind, report=steps.append)
    assert sum(steps) == 30
    assert not build_index(noise, kind)  # it is done
    index = Index.open(noise, counting)
    assert index.kind == kind
    assert ids_of(index, counting) == exact
    del index
    moved = noise.rename(noise.with_name("moved"))  # a store that lies with its embeddings moves with them
    assert ids_of(Index.open(moved, counting), counting) == exact
    build_index(moved, "exact")
    assert not (moved / f"index-{kind}").exists()
    assert Index.open(moved, counting).kind == "exact"


def test_an_interrupted_build_is_no_index_and_goes_on(noise, counting, small_steps):
    def stop(rows: int) -> None:
        steps.append(rows)
        if sum(steps) >= 18:
            raise KeyboardInterrupt

    steps: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        build_index(noise, "lance", report=stop)
    index = Index.open(noise, counting)
    assert index.kind == "exact"
    assert len(ids_of(index, counting)) == 10
    open_store = index_module.open_store
    taken: list[int] = []

    def counted(*arguments, **options):
        store = open_store(*arguments, **options)
        add = store.add
        store.add = lambda ids, *rest: (taken.extend(ids.tolist()), add(ids, *rest))[1]
        return store

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "open_store", counted)
        assert build_index(noise, "lance")
    assert taken == list(range(sum(steps), 30))
    assert Index.open(noise, counting).kind == "lance"


def test_an_index_of_older_embeddings_is_refused_and_made_anew(noise, counting, tmp_path):
    build_index(noise, "lance")
    for file in noise.glob("part-*"):
        file.unlink()
    encode_shard(counting, np.zeros((3, 20, 20, 3), np.uint8), noise, columns={"number": [0, 1, 2]})
    with pytest.raises(ArtifactError, match="embedded again after indexing"):
        Index.open(noise, counting)
    build_index(noise, "lance")
    assert sorted(ids_of(Index.open(noise, counting), counting)) == [0, 1, 2]


def test_a_store_that_is_gone_is_not_searched(noise, counting):
    build_index(noise, "usearch")
    shutil.rmtree(noise / "index-usearch")
    with pytest.raises(ArtifactError, match=r"is now empty.*run `clipadapt index"):
        Index.open(noise, counting)


def test_a_place_of_other_vectors_is_refused(noise, counting, tmp_path):
    encode_shard(counting, np.zeros((40, 20, 20, 3), np.uint8), tmp_path / "other")
    build_index(tmp_path / "other", "usearch", str(tmp_path / "store"))
    with pytest.raises(ArtifactError):
        build_index(noise, "usearch", str(tmp_path / "store"))
    assert Index.open(noise, counting).kind == "exact"


def test_damaged_and_newer_notes(noise, counting):
    build_index(noise, "usearch")
    note = noise / "index.json"
    state = json.loads(note.read_text())
    note.write_text("{")
    with pytest.raises(ArtifactError, match=r"index\.json is damaged"):
        Index.open(noise, counting)
    note.write_text(json.dumps(state | {"format": 99}))
    with pytest.raises(ArtifactError, match="upgrade clipadapt"):
        Index.open(noise, counting)


def test_passwords_are_not_kept(noise):
    with pytest.raises(ClipadaptError, match="would store the password"):
        build_index(noise, "pgvector", "postgresql://me:secret@host/images")
    assert not list(noise.glob("*index.json"))
