"""The dictionary's files: meanings, kinds of physical things, how often words are met."""

from __future__ import annotations

import pytest

from clipadapt.data.corpus.wordnet import THING, WordNet
from clipadapt.errors import DataError
from tests.dictionary import write_dictionary


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory):
    return WordNet(write_dictionary(tmp_path_factory.mktemp("wordnet")))


def test_a_sense_has_names_a_gloss_and_what_it_is_a_kind_of(wordnet):
    dog = wordnet.senses["n02084071"]
    assert dog.names == ("dog", "domestic dog")
    assert dog.gloss == "a member of the genus Canis"  # without the example
    assert dog.above == ("n00015388",)
    assert not dog.named


def test_things_are_kinds_of_physical_things_by_their_first_meaning(wordnet):
    assert list(wordnet.things) == ["animal", "crane", "dog", "domestic dog", "lifting device", "physical entity"]
    assert wordnet.things["crane"].id == "n03126707"  # the machine comes first here, the bird second
    assert "idea" not in wordnet.things  # no physical thing
    assert "fido" not in wordnet.things  # a single dog
    assert wordnet.things["physical entity"].id == THING


def test_frequency_counts_all_meanings_of_nouns(wordnet):
    assert wordnet.frequency["dog"] == 42
    assert wordnet.frequency["crane"] == 5
    assert wordnet.frequency["run"] == 0  # a verb


def test_a_folder_without_a_dictionary_is_named(tmp_path):
    with pytest.raises(DataError, match=r"holds no WordNet: usr/share/wordnet/data\.noun is missing"):
        WordNet(tmp_path)
