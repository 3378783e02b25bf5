"""The corpus builder on archives written here: emoji styles, icon sets of several licences, annotations of CLDR."""

import dataclasses
import io
import json
import shutil
import tarfile

import numpy as np
import pytest

from clipadapt.data.corpus.packages import NPM
from clipadapt.data.corpus.pairs import Corpus, augment, build_corpus
from clipadapt.data.corpus.sources import (
    HELDOUT_SETS,
    Annotations,
    clean_name,
    clipart_records,
    is_chosen,
    is_heldout_name,
)
from clipadapt.errors import DataError

ANIMALS = {
    "1f431": "cat face", "1f436": "dog face", "1f40e": "horse", "1f404": "cow", "1f416": "pig", "1f411": "ewe",
    "1f410": "goat", "1f42a": "camel", "1f418": "elephant", "1f401": "mouse", "1f400": "rat", "1f439": "hamster",
    "1f430": "rabbit face", "1f43f": "chipmunk", "1f994": "hedgehog", "1f987": "bat", "1f43b": "bear", "1f428": "koala",
    "1f43c": "panda", "1f9a5": "sloth", "1f9a6": "otter", "1f9a8": "skunk", "1f998": "kangaroo", "1f9a1": "badger",
    "1f983": "turkey", "1f414": "chicken", "1f413": "rooster", "1f426": "bird", "1f427": "penguin", "1f54a": "dove",
    "1f985": "eagle", "1f986": "duck", "1f9a2": "swan", "1f989": "owl", "1f99a": "peacock", "1f99c": "parrot",
}  # fmt: skip
HELDOUT_ANIMALS = {name for name in ANIMALS.values() if is_heldout_name(name)}
WAVE = "1f44b-1f3fb"


def icon_set(icons, chars=None, **fields):
    """An icon set as iconify keeps it; every icon is a shape in its own colour, or in `currentColor`."""
    bodies = {name: {"body": f'<path fill="{colour}" d="M4 4h16v12h-16z"/>'} for name, colour in icons.items()}
    return {"icons": bodies, "width": 24, "height": 24, "chars": chars or {}, **fields}


def write_archive(file, documents):
    with tarfile.open(file, "w:gz") as tar:
        for name, document in documents.items():
            data = json.dumps(document).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def info(licence, palette=True, category="Emoji"):
    author = {"name": "A. Painter", "url": "https://example.org"}
    return {"name": "A set", "author": author, "license": {"spdx": licence}, "palette": palette, "category": category}


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archives")
    names = {name.replace(" ", "-"): codes for codes, name in ANIMALS.items()}
    colours = {name: f"#{codes[-4:]:0>6}" for name, codes in names.items()}
    chars = {codes: name for name, codes in names.items()} | {WAVE: "waving-hand-light-skin-tone"}
    sets = {
        "noto": icon_set(
            colours | {"waving-hand-light-skin-tone": "#fc9"}, chars, aliases={"kitty": {"parent": "cat-face"}}
        ),
        "fxemoji": icon_set({"catface": "#333", "e50a": "#333"}),
        "fluent-emoji-flat": icon_set(colours, chars),
        "fluent-emoji-high-contrast": icon_set(colours, chars),
        "openmoji": icon_set(colours, chars),
        "logos": icon_set({"some-brand": "red"}),
        "game-icons": icon_set({"round-shield-2": "currentColor"}),
        "flag": icon_set({"fr-4x3": "blue", "zz-4x3": "blue"}),
        "broken": {"icons": {"torn-page": {"body": "<path"}}},
    }
    infos = {
        "noto": info("Apache-2.0"),
        "fxemoji": info("Apache-2.0"),
        "fluent-emoji-flat": info("MIT"),
        "fluent-emoji-high-contrast": info("MIT"),
        "openmoji": info("CC-BY-SA-4.0"),
        "logos": info("CC0-1.0", category="Logos"),
        "game-icons": info("CC-BY-3.0", palette=False, category="Thematic"),
        "flag": info("MIT", category="Flags / Maps"),
        "broken": info("MIT", category="UI Multicolor"),
    }
    english = {
        "".join(chr(int(code, 16)) for code in codes.split("-")): {
            "tts": [name],
            "default": ["animal", name.split()[0]],
        }
        for codes, name in ANIMALS.items()
    }
    spanish = {"\U0001f431": {"tts": ["cara de gato"]}}
    derived = {
        "\U0001f44b\U0001f3fb": {"tts": ["waving hand: light skin tone"], "default": ["light skin tone", "wave"]},
        "\U0001f1eb\U0001f1f7": {"tts": ["flag: France"], "default": ["flag"]},
    }
    iconify, cldr, cldr_derived = (
        folder / f"{package.strip('@').replace('/', '-')}-{version}.tgz" for package, version in NPM.items()
    )
    write_archive(
        iconify, {"collections.json": infos} | {f"json/{prefix}.json": icons for prefix, icons in sets.items()}
    )
    write_archive(
        cldr,
        {
            "annotations/en/annotations.json": {"annotations": {"annotations": english}},
            "annotations/es/annotations.json": {"annotations": {"annotations": spanish}},
        },
    )
    write_archive(
        cldr_derived, {"annotationsDerived/en/annotations.json": {"annotationsDerived": {"annotations": derived}}}
    )
    return folder


@pytest.fixture(scope="module")
def built(archives, tmp_path_factory):
    """A corpus folder and what its building printed; apt is taken to be missing."""
    out, said = tmp_path_factory.mktemp("corpus"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "which", lambda name: None)
        build_corpus(out, archives=archives, playground=60, workers=1, report=said.append)
    return out, said


@pytest.fixture(scope="module")
def corpus(built):
    return Corpus.open(built[0])


def test_licences_and_brands(corpus):
    sources = {pair["source"] for pair in corpus.pairs}
    assert sources == {"noto", "fxemoji", "fluent-emoji-flat", "game-icons", "flag", "playground"}
    facts = json.loads((corpus.folder / "corpus.json").read_text())
    assert facts["sources"]["noto"]["licence"] == "Apache-2.0"
    assert facts["sources"]["noto"]["author"] == "A. Painter"
    assert facts["sources"]["noto"]["pictures"] == len(ANIMALS) + 1
    assert facts["packages"]["@iconify/json"] == NPM["@iconify/json"]
    assert "openmoji" not in facts["sources"]
    assert facts["pictures"] == len(corpus.pairs) == len(corpus.images)


def test_missing_clip_art_is_reported(built):
    assert built[1][0] == "openclipart-png is left out: apt-get and dpkg-deb are not both installed."


def test_what_cannot_be_drawn_is_counted(corpus, built):
    assert json.loads((corpus.folder / "corpus.json").read_text())["not_drawn"] == {"broken": 1}
    assert "1 could not be drawn" in built[1][-1]


def test_names_come_from_code_points_and_from_other_sets(corpus):
    by_source = {}
    for pair in corpus.pairs:
        by_source.setdefault(pair["source"], {})[pair["name"]] = pair
    cat = by_source["noto"]["cat face"]
    assert cat["texts"] == ["cat face", "cat", "kitty"]
    assert cat["keywords"] == ["animal"]
    assert cat["other"] == ["cara de gato"]
    assert set(by_source["fxemoji"]) == {"cat face"}  # "catface"; nobody knows "e50a"
    assert by_source["noto"]["waving hand"]["texts"] == ["waving hand", "waving hand, light skin tone"]
    assert set(by_source["flag"]) == {"flag of france"}
    assert set(by_source["game-icons"]) == {"round shield"}


def test_splits(corpus):
    assert HELDOUT_ANIMALS, "the test needs a held-out name"
    for pair in corpus.pairs:
        if pair["kind"] == "playground":
            continue
        if pair["name"] in HELDOUT_ANIMALS:
            assert pair["split"] == "heldout-name"
        elif pair["source"] in HELDOUT_SETS:
            assert pair["split"] == "heldout-style"
        elif not is_heldout_name(pair["name"]):
            assert pair["split"] == "train"


def test_playground_splits(corpus):
    from clipadapt.data.playground.drawing import HELDOUT_KINDS, HELDOUT_STYLE, Playground

    scenes = [pair for pair in corpus.pairs if pair["kind"] == "playground"]
    for index, pair in enumerate(scenes):
        scene = Playground(size=64, seed=0).scene(index)
        unseen_kind = any(thing.kind in HELDOUT_KINDS for thing in scene.objects)
        assert (pair["split"] == "train") == (not unseen_kind and scene.style != HELDOUT_STYLE)
        assert pair["texts"] == scene.captions
    assert {pair["split"] for pair in scenes} == {"train", "heldout-name", "heldout-style"}


class RecordedImages:
    """Images that remember which of them were read."""

    def __init__(self, images):
        self.images, self.read = images, set()

    def __getitem__(self, index):
        self.read.add(int(index))
        return self.images[index]


def test_heldout_images_never_enter_training(corpus):
    watched = RecordedImages(corpus.images)
    source = dataclasses.replace(corpus, images=watched)
    texts = [text for step in range(60) for text in source.batch(step, 16, 8, seed=3)[1]]
    trained = set(corpus.select("train"))
    assert watched.read <= trained
    assert len(watched.read) > 0.9 * len(trained)
    heldout_words = {name.removesuffix(" face") for name in HELDOUT_ANIMALS}
    assert not heldout_words & {word for text in texts for word in text.rstrip(".").split()}
    assert not HELDOUT_ANIMALS & set(corpus.training_texts())


def test_batches_depend_on_seed_and_step_only(corpus):
    pixels, texts = corpus.batch(5, 16, 24, seed=1)
    again, same = corpus.batch(5, 16, 24, seed=1)
    assert pixels.shape == (16, 3, 24, 24)
    assert pixels.numpy().dtype == np.uint8
    assert (pixels == again).all()
    assert texts == same
    for step, seed in ((6, 1), (5, 2)):
        assert corpus.batch(step, 16, 24, seed)[1] != texts


def test_no_text_twice_in_a_batch(corpus):
    for step in range(50):
        texts = corpus.batch(step, 24, 8, seed=0)[1]
        assert len(set(texts)) == 24


def test_a_batch_larger_than_the_names_is_refused(corpus):
    with pytest.raises(DataError, match="a batch of 5000 needs"):
        corpus.batch(0, 5000, 8, seed=0)


def test_views_are_whole_images_on_white(corpus):
    index = corpus.select("train", source="noto")[0]
    (view,) = corpus.views([index], 24)
    assert (view[:, :2] == 255).all()  # above the shape, which fills rows 4 to 15 and columns 4 to 19
    rgba = corpus.images[index]
    assert rgba[32, 32, 3] == 255
    assert (view[:, 12, 12].numpy() == rgba[32, 32, :3]).all()


def test_augmented_images_keep_left_and_right():
    half = np.zeros((64, 16, 16, 4), np.uint8)
    half[..., 3] = 255
    half[:, :, 8:, :3] = 255
    for is_scene in (True, False):
        views = augment(half, np.full(64, is_scene), 16, np.random.default_rng(0)).float()
        left, right = views[:, :, 4:12, 4:8].mean((1, 2, 3)), views[:, :, 4:12, 8:12].mean((1, 2, 3))
        assert (left < right).all()
    assert views.flatten(1).unique(dim=0).shape[0] == 64  # and no two are alike


def test_an_unfinished_corpus_is_not_opened(tmp_path, corpus):
    (tmp_path / "images.npy.part").write_bytes(b"half")
    with pytest.raises(DataError, match=r"holds no corpus.json; build it with: clipadapt pretrain corpus"):
        Corpus.open(tmp_path)
    for name in ("corpus.json", "images.npy", "pairs.jsonl"):
        shutil.copy(corpus.folder / name, tmp_path)
    lines = (tmp_path / "pairs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "pairs.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(DataError, match="build it again"):
        Corpus.open(tmp_path)


def test_missing_packages_and_no_npm(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(DataError, match=r"iconify-json-.* npm is not installed"):
        build_corpus(tmp_path, playground=0)


def test_a_failed_download_says_why(tmp_path, monkeypatch):
    (tmp_path / "npm").write_text("#!/bin/sh\necho no such package >&2\nexit 3\n")
    (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(DataError, match=r"`npm pack @iconify/json@\S+` failed with status 3 .* no such package"):
        build_corpus(tmp_path / "out", playground=0)


@pytest.mark.parametrize(
    ("identifier", "words"),
    [
        ("apple-core_02", "apple core"),
        ("camera-24-filled", "camera"),
        ("justice-24px", "justice"),
        ("flagpole", "flagpole"),
        ("flat", "flat"),
        ("redApple", "red apple"),
        ("man-astronaut-1", "man astronaut"),
    ],
)
def test_clean_name(identifier, words):
    assert clean_name(identifier) == words


def test_a_face_is_held_out_with_its_animal():
    for name in ANIMALS.values():
        assert is_heldout_name(name) == is_heldout_name(name.removesuffix(" face") + " face")


def test_is_chosen():
    assert is_chosen("some-colours", info("MIT", category=None))
    assert not is_chosen("some-colours", info("CC-BY-NC-4.0"))
    assert not is_chosen("some-outlines", info("MIT", palette=False))


def test_clipart_names_stop_at_authors(tmp_path, archives):
    root = tmp_path / "usr/share/openclipart/png"
    for file in ("hats/cat_face_dave_pena_01.png", "animals/birds/xyz_01.png", "unsorted/xyz_02.png"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    words = Annotations([archives / f"cldr-annotations-full-{NPM['cldr-annotations-full']}.tgz"]).words()
    records = list(clipart_records(tmp_path, words))
    assert [(record.name, record.keywords) for record in records] == [("birds", []), ("cat face", ["hats"])]
