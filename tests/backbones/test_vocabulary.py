import pytest
from transformers import CLIPTokenizer

from clipadapt.backbones.vocabulary import END, START, train_tokenizer

TEXTS = ["a photo of a red apple.", "a red pear", "three red circles", "ein roter Apfel"] * 5


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, size=600, context_length=12)


def test_form_of_the_vocabulary(tokenizer):
    vocabulary = tokenizer.get_vocab()
    assert len(tokenizer) <= 600
    assert sorted(vocabulary.values()) == list(range(len(tokenizer)))
    assert vocabulary[START] == len(tokenizer) - 2
    assert vocabulary[END] == len(tokenizer) - 1 == tokenizer.eos_token_id
    assert "red</w>" in vocabulary
    assert tokenizer.model_max_length == 12


def test_case_and_spaces_do_not_matter(tokenizer):
    ids = tokenizer("A RED   apple").input_ids
    assert ids == tokenizer("a red apple").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("text", ["zebra crossing", "日本語", "naïve façade", "🍎 42%"])
def test_any_text_can_be_written(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert END not in tokenizer.convert_ids_to_tokens(ids)[1:-1]
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    assert decoded.replace(" ", "") == text.replace(" ", "")


def test_saved_tokenizer_is_clips_own(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    texts = ["three red apples and a pear", "unknown words: xylophone"]
    assert loaded(texts).input_ids == tokenizer(texts).input_ids
    assert len(loaded) == len(tokenizer)


def test_the_same_texts_give_the_same_vocabulary(tokenizer):
    assert train_tokenizer(iter(TEXTS), size=600).get_vocab() == tokenizer.get_vocab()
