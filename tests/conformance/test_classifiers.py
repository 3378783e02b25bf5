"""What every classifier must do, whatever it is. A new method is under test as soon as its file exists."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook

import clipadapt
from clipadapt.backbones import Backbone, load_backbone
from clipadapt.data import Dataset
from clipadapt.data.digits import handwritten_digits
from clipadapt.errors import ClipadaptError
from clipadapt.evaluation.selection import select
from clipadapt.features import encode_images
from clipadapt.methods import create, method_class
from clipadapt.methods.recipe import recipe
from tests.conformance import stand_ins  # noqa: F401 - registers the methods
from tests.quick import NEEDED, QUICK, brief, card, keys, quick

KEYS = keys(task="classifier")


def pixels_of(backbone: Backbone, data: Dataset) -> torch.Tensor:
    return torch.stack([backbone.preprocess(item.open()) for item in data.items])


# -- one fit, looked at from all sides --------------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
def test_contract(key, backbone, support, queries, fitted):
    model = fitted(key)
    assert isinstance(model, method_class(key))
    labels, probabilities = model.predict(queries), model.predict_proba(queries)
    assert labels.shape == (8,)
    assert probabilities.shape == (8, 4)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    np.testing.assert_array_equal(probabilities.argmax(1), labels)
    assert model.class_names_ == support.class_names
    assert model.score(queries) == (labels == np.array(queries.labels)).mean()
    # a single image in any form, and none at all
    image = queries.items[0].open()
    pixels = backbone.preprocess(image)[None]
    for one in ([image], [queries.items[0]], pixels):
        np.testing.assert_allclose(model.predict_proba(one), probabilities[:1], atol=1e-4)
    assert model.predict([]).shape == (0,)
    assert model.predict_proba([]).shape == (0, 4)


@pytest.mark.parametrize("key", KEYS)
def test_unfitted_says_so(key, queries):
    with pytest.raises(ClipadaptError, match="not fitted"):
        create(key).predict(queries)


@pytest.mark.parametrize("key", KEYS)
def test_saved_and_loaded_is_equal(key, backbone, queries, fitted, tmp_path):
    model = fitted(key)
    folder = model.save(tmp_path / "model")
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    loaded = clipadapt.load(folder, backbone)
    assert type(loaded) is type(model)
    assert recipe(loaded) == json.loads(json.dumps(recipe(model)))
    assert loaded.class_names_ == model.class_names_
    assert loaded.trained_parameters == model.trained_parameters
    np.testing.assert_allclose(loaded.predict_proba(queries), model.predict_proba(queries), atol=1e-6)
    assert loaded.encoder.image_fingerprint == model.encoder.image_fingerprint
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    again = loaded.save(tmp_path / "again")
    assert files == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in again.iterdir()}


@pytest.mark.parametrize("key", KEYS)
def test_new_classes(key, backbone, support, queries, fitted, tmp_path):
    """A fitted method serves other names without refitting, or says that it cannot; itself it stays as it was."""
    model, before = fitted(key), fitted(key).predict_proba(queries)
    names = ["large cat", "house", support.class_names[1], "star", "dog"]
    if not card(key).new_classes:
        with pytest.raises(ClipadaptError, match="cannot be applied to new classes"):
            model.with_classes(names)
        return
    if model.settings.get("class_specific"):
        model = brief(key, class_specific=False).fit(backbone, support)
        before = model.predict_proba(queries)
    other = model.with_classes(names)
    probabilities = other.predict_proba(queries)
    assert probabilities.shape == (8, 5)
    assert other.class_names_ == names
    assert other.trained_parameters == model.trained_parameters
    turned = model.with_classes(names[::-1]).predict_proba(queries)
    np.testing.assert_allclose(turned, probabilities[:, ::-1], atol=1e-4)
    np.testing.assert_allclose(model.with_classes(support.class_names).predict_proba(queries), before, atol=1e-5)
    loaded = clipadapt.load(other.save(tmp_path / "other"), backbone)
    np.testing.assert_allclose(loaded.predict_proba(queries), probabilities, atol=1e-6)
    np.testing.assert_array_equal(model.predict_proba(queries), before)
    with pytest.raises(ClipadaptError, match="two classes"):
        model.with_classes(["one"])


@pytest.mark.parametrize("key", KEYS)
def test_encoder_and_head_give_the_logits(key, backbone, queries, fitted):
    """What other rooms read: how images are seen, and how that becomes logits, where features suffice for it."""
    model, pixels = fitted(key), pixels_of(backbone, queries)
    scores, kept = model.image_logits(queries)
    assert kept == list(range(8))
    with torch.no_grad():
        seen = model.encoder.encode(pixels)
    assert seen.shape == (8, model.encoder.dim)
    encoded = encode_images(model.encoder, queries, cache=model.encoder.fingerprint is not None).features
    torch.testing.assert_close(encoded, seen.float().cpu(), atol=1e-5, rtol=1e-4)
    if model.head is None:
        with pytest.raises(ClipadaptError, match="use image_logits or predict"):
            model.logits(torch.ones(1, model.dim_))
        return
    with torch.no_grad():
        torch.testing.assert_close(model.head.logits(seen), scores, atol=1e-4, rtol=1e-4)
    if model.head.weight is not None:
        linear = seen @ model.head.weight.T + (0 if model.head.bias is None else model.head.bias)
        torch.testing.assert_close(linear, scores, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("key", KEYS)
def test_embeddings_know_which_models_share_them(key, backbone, queries, fitted):
    """The fingerprint of the image side is that of the plain backbone exactly where images are encoded as by it."""
    encoder, pixels = fitted(key).encoder, pixels_of(backbone, queries)
    with torch.no_grad():
        seen, plain = encoder.encode(pixels), backbone.encode(pixels)
    assert (encoder.image_fingerprint == backbone.image_fingerprint) == torch.equal(seen, plain)
    assert not encoder.aligned or encoder.dim == backbone.dim


@pytest.mark.parametrize("key", KEYS)
def test_texts_are_encoded_in_the_space_of_images(key, backbone, fitted):
    model, texts = fitted(key), ["a red circle", "a cat"]
    if model.settings.get("class_specific"):
        with pytest.raises(ClipadaptError, match="class_specific=True"):
            model.encode_texts(texts)
        return
    try:
        features = model.encode_texts(texts)
    except ClipadaptError as error:
        assert "depend on the image or are several" in str(error)  # noqa: PT017
        return
    assert features.shape == (2, backbone.dim)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(model.encode_texts(texts[1:]), features[1:], atol=1e-5, rtol=0)
    assert model.adapts_texts or torch.equal(features, backbone.encode_texts(texts))


@pytest.mark.parametrize("key", keys(task="classifier", kind="weights"))
def test_adapted_towers_export_as_a_plain_folder(key, backbone, queries, fitted, tmp_path):
    """Unless what was learned is not weights, which it then says; the model itself has adapted towers either way."""
    model = fitted(key)
    if model.encoder is not model.backbone_:
        with pytest.raises(ClipadaptError, match="cannot be exported"):
            model.export(tmp_path / "towers")
        return
    model.export(tmp_path / "towers")
    exported, pixels = load_backbone(tmp_path / "towers"), pixels_of(backbone, queries)
    with torch.no_grad():
        torch.testing.assert_close(exported.encode_images(pixels), model.backbone_.encode_images(pixels))
    assert exported.fingerprint == model.backbone_.fingerprint


# -- further fits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
def test_a_fit_is_reproducible_and_changes_nothing_else(
    key, backbone, untouched, support, queries, fit, fitted, monkeypatch
):
    """And reports its steps, counts what it trains, and where it requires nothing, runs on any backbone."""
    before, reports, counts = fitted(key).predict_proba(queries), [], []
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in backbone.model.modules()]
    assert card(key).requires <= backbone.capabilities
    if not card(key).requires:
        monkeypatch.setattr(Backbone, "capabilities", frozenset())
    handle = register_optimizer_step_pre_hook(
        lambda optimizer, *_: counts.append(sum(p.numel() for g in optimizer.param_groups for p in g["params"]))
    )
    torch.manual_seed(123)  # the global stream must not matter, and goes on as if nothing had been drawn
    drawn = torch.get_rng_state()
    model = fit(key, backbone, support, report=reports.append)
    handle.remove()
    assert torch.equal(torch.get_rng_state(), drawn)
    np.testing.assert_array_equal(model.predict_proba(queries), before)

    assert backbone.fingerprint == untouched
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert not backbone.model.training
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in backbone.model.modules()]
    changed = model.adapts_texts or model.encoder.image_fingerprint != backbone.image_fingerprint
    assert changed or card(key).kind not in ("weights", "prompts")
    assert card(key).kind == "weights" or model.backbone_ is backbone, "only weight methods have their own backbone"

    for number, line in enumerate(reports, start=1):
        assert (line["step"], line["steps"]) == (number, len(reports))
        assert math.isfinite(line["loss"])
    if counts:
        assert model.trained_parameters == counts[-1]
    else:
        assert (model.trained_parameters > 0) == bool(card(key).trains)


@pytest.mark.parametrize("key", KEYS)
def test_a_backbone_that_lacks_what_it_requires_is_refused(key, backbone, support, fit, monkeypatch):
    for lacking in sorted(card(key).requires):
        monkeypatch.setattr(Backbone, "capabilities", card(key).requires - {lacking})
        with pytest.raises(ClipadaptError, match=f"needs a backbone with {lacking}; "):
            fit(key, backbone, support)


@pytest.mark.parametrize("key", KEYS)
def test_order_of_classes_does_not_matter(key, backbone, support, queries, fit, fitted):
    order = [2, 0, 3, 1]
    names = [support.class_names[c] for c in order]
    permuted = dataclasses.replace(support, labels=[order.index(label) for label in support.labels], class_names=names)
    model = fit(key, backbone, permuted)
    np.testing.assert_allclose(model.predict_proba(queries), fitted(key).predict_proba(queries)[:, order], atol=2e-3)


ROWS = {"one-shot": range(0, 16, 4), "missing-class": range(12), "uneven": [0, 1, 2, 3, 4, 8, 12]}


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("shape", ROWS)
def test_odd_support_sets(key, shape, backbone, support, queries, fit):
    probabilities = fit(key, backbone, support.select(ROWS[shape])).predict_proba(queries)
    assert probabilities.shape == (8, 4)
    assert np.isfinite(probabilities).all()
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize("key", KEYS)
def test_an_empty_support_set_is_refused(key, backbone, support, fit):
    if card(key).signal != "labels":
        assert fit(key, backbone, class_names=support.class_names).class_names_ == support.class_names
    else:
        with pytest.raises(ClipadaptError, match="labelled images"):
            fit(key, backbone, support.select([]))
        with pytest.raises(ClipadaptError, match="labelled images"):
            fit(key, backbone, class_names=support.class_names)
    with pytest.raises(ClipadaptError, match="support set"):
        fit(key, backbone)


@pytest.mark.parametrize("key", KEYS)
def test_unlabelled_images(key, backbone, support, queries):
    """They do instead of labelled ones where a card says that they are used; elsewhere they are refused."""
    if not card(key).unlabelled:
        with pytest.raises(ClipadaptError, match="does not use unlabelled images"):
            brief(key).fit(backbone, support, unlabelled=queries)
        return
    probabilities = [
        brief(key).fit(backbone, unlabelled=images, class_names=support.class_names).predict_proba(queries)
        for images in (support, support.items)
    ]
    assert probabilities[0].shape == (8, 4)
    np.testing.assert_array_equal(probabilities[0], probabilities[1], "labels are not looked at")
    if card(key).signal == "unlabelled":
        with pytest.raises(ClipadaptError, match="learns from unlabelled images"):
            brief(key).fit(backbone, support)


@pytest.mark.parametrize("key", KEYS)
def test_tasks_of_a_stream(key, backbone, support, fit):
    """The classes of a later step come on top of those before, where a card says so; elsewhere a task is refused."""
    first, second = support.stream(tasks=2, seed=1)
    if not card(key).streams:
        with pytest.raises(ClipadaptError, match="does not learn task after task"):
            fit(key, backbone, first.data, task=first.name)
        return
    model = fit(key, backbone, first.data, task=first.name)
    assert model.class_names_ == first.class_names
    assert model.fit(backbone, second.data, task=second.name) is model
    assert model.class_names_ == second.class_names
    assert model.predict_proba(support).shape == (16, 4)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("key", KEYS)
def test_an_interrupted_fit_goes_on(key, backbone, support, queries, fit, fitted, tmp_path, monkeypatch):
    """The same call ends with the same model and does not do again what was done."""
    monkeypatch.setattr("clipadapt.training.loop.SAVE_EVERY", 0.0)

    def interrupt(line: dict) -> None:
        if line["step"] == line["steps"] // 2 + 1:
            raise Interrupted

    resumed = []
    try:
        fit(key, backbone, support, report=interrupt, resume=tmp_path / "run")
    except Interrupted:
        assert any(path.is_file() for path in tmp_path.rglob("*")), "what was done is kept"
        model = fit(key, backbone, support, report=resumed.append, resume=tmp_path / "run")
        assert resumed[0]["step"] > 1, "what was done is not done again"
        np.testing.assert_array_equal(model.predict_proba(queries), fitted(key).predict_proba(queries))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "nothing is left of a fit that ended"


# -- features alone ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", keys(task="classifier", kind="features"))
def test_features_alone_suffice(key, tmp_path):
    """torch or numpy, rows of any length, no backbone; saved and loaded without one."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((3, 16))
    labels = np.repeat(np.arange(3), 5)
    x = centres[labels] + 0.3 * rng.standard_normal((15, 16))
    t = centres + 0.5 * rng.standard_normal((3, 16))
    more = {"unlabelled": x} if card(key).signal == "unlabelled" else dict.fromkeys(NEEDED.get(key, ()), t)
    assert (quick(key).fit_features(x, labels, t, logit_scale=20.0, **more).logits(x).argmax(1) == labels).all()
    head = brief(key).fit_features(x, labels, t, logit_scale=20.0, **more)
    logits = head.logits(x)
    assert isinstance(logits, np.ndarray)
    assert logits.shape == (15, 3)
    other = brief(key).fit_features(
        torch.from_numpy(5 * x), torch.from_numpy(labels), torch.from_numpy(t), logit_scale=20.0, **more
    )
    torch.testing.assert_close(other.logits(torch.from_numpy(x)), torch.from_numpy(logits), atol=1e-4, rtol=1e-4)
    loaded = clipadapt.load(head.save(tmp_path / "head"))
    np.testing.assert_array_equal(loaded.logits(x), logits)
    assert head.logits(np.zeros((0, 16))).shape == (0, 3)
    with pytest.raises(ClipadaptError, match="shape"):
        head.logits(np.zeros((2, 17)))
    with pytest.raises(ClipadaptError, match="features, not images"):
        head.predict([Image.new("RGB", (8, 8))])
    for wrong in (labels[:-1], labels - 1, labels + 1, labels + 0.5):
        with pytest.raises(ClipadaptError, match="labels must"):
            brief(key).fit_features(x, wrong, t, **more)
    with pytest.raises(ClipadaptError, match="not finite"):
        brief(key).fit_features(np.where(x > 1, np.nan, x), labels, t, **more)


# -- something is learned ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def digits() -> tuple[Backbone, Dataset, Dataset, float]:
    """A small real task: five of scikit-learn's handwritten digits, 8 shots, on the embedded model; zero-shot on it."""
    train, test = handwritten_digits().base_new_split()[0].split(test=0.2, seed=1)
    backbone, test = load_backbone(), test.few_shot(20, seed=1)
    return backbone, train.few_shot(8, seed=1), test, create("zero-shot").fit(backbone, test).score(test)


LEARNING = [
    pytest.param(key, marks=pytest.mark.claim(key, "five handwritten digits, 8 shots: above zero-shot"))
    for key in keys(task="classifier", signal="labels")
    if card(key).family != "tests"
]


@pytest.mark.parametrize("key", LEARNING)
def test_beats_zero_shot_on_a_small_real_task(key, digits):
    """Where features are learned from, with the setting that cross-validation inside the support set chooses."""
    backbone, support, test, zero_shot = digits
    method = quick(key)
    if method.search_space and card(key).kind == "features":
        given = {key: QUICK.get(key, {})}
        trials = select(backbone, support, keys=[key], folds=2, budget=math.inf, overrides=given).trials
        method = trials[1].create()
    assert method.fit(backbone, support).score(test) > zero_shot + 0.1
