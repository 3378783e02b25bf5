"""Labels from sentences: names, plurals, synonyms, overlaps; captions from files; made sentences."""

from __future__ import annotations

import pytest

from clipadapt.data.captions import made_sentences, named_classes, plural, read_captions
from clipadapt.errors import ClipadaptError, DataError

NAMES = ["dog", "hot_dog", "bus", "person", "pine tree"]


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("A dog on a bus.", {"dog", "bus"}),
        ("Two DOGS, three buses and many people", {"dog", "bus", "person"}),
        ("a hot dog", {"hot_dog"}),  # and no dog
        ("hot  dogs for the dog", {"hot_dog", "dog"}),
        ("dogged busy hotdog persona", set()),  # whole words only
        ("dog-house by the pine trees", {"dog", "pine tree"}),
        ("puppies and a coach", {"dog", "bus"}),
        ("", set()),
    ],
)
def test_classes_named_by_a_sentence(sentence, expected):
    (found,) = named_classes([sentence], NAMES, {"dog": ["puppy"], "bus": ["coach"]})
    assert {NAMES[c] for c in found} == expected


def test_a_word_can_name_several_classes():
    assert named_classes(["a jaguar"], ["cat", "car"], {"cat": ["jaguar"], "car": ["Jaguar"]}) == [frozenset({0, 1})]


def test_synonyms_of_an_unknown_class_are_refused():
    with pytest.raises(ClipadaptError, match="Unknown class 'dogs'; did you mean 'dog'"):
        named_classes(["x"], NAMES, {"dogs": ["puppy"]})


@pytest.mark.parametrize(
    ("one", "many"),
    [("cat", "cats"), ("dish", "dishes"), ("lady", "ladies"), ("key", "keys"), ("snow leaf", "snow leaves")],
)
def test_plural(one, many):
    assert plural(one) == many


def test_captions_from_files_and_lists(tmp_path):
    text, rows = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text("a dog\n\n a cat \n", encoding="utf-8")
    rows.write_text('"a dog"\n{"caption": "a cat", "id": 3}\n', encoding="utf-8")
    for captions in (text, str(rows), ["a dog", "a cat"]):
        assert read_captions(captions) == ["a dog", "a cat"]
    rows.write_text('"a dog"\n{"text": "a cat"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r'a\.jsonl: entry 2 is neither a string nor an object with a "caption"'):
        read_captions(rows)
    with pytest.raises(DataError, match="absent"):
        read_captions(tmp_path / "absent.txt")


def test_made_sentences_name_two_or_three_classes():
    sentences = made_sentences(NAMES, 200, seed=1)
    assert sentences == made_sentences(NAMES[::-1], 200, seed=1) != made_sentences(NAMES, 200, seed=2)
    counts = [len(found) for found in named_classes(sentences, NAMES)]
    assert set(counts) == {2, 3}
    assert {len(found) for found in named_classes(made_sentences(["cat", "owl"], 9, seed=1), ["cat", "owl"])} == {2}
    assert any("an owl" in sentence for sentence in made_sentences(["cat", "owl"], 9, seed=1))
