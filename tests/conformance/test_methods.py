"""What every registered method must do, whatever it is. A new method is under test as soon as its file exists."""

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
from clipadapt.methods import FeatureMethod, Method, create, list_methods, method_class
from clipadapt.methods.artifact import recipe
from clipadapt.methods.base import WeightMethod
from tests.pictures import colours
from tests.tiny import tiny_clip

KEYS = list_methods()


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone(tiny_clip())


@pytest.fixture(scope="module")
def support() -> Dataset:
    return colours(4, seed=1)


@pytest.fixture(scope="module")
def queries() -> Dataset:
    return colours(2, seed=2)


def quick(key: str) -> Method:
    return create(key, **method_class(key).tiny)


def fit(key: str, backbone: Backbone, support: Dataset | None = None, **kwargs) -> Method:
    """A quick fit; what learns from unlabelled pictures gets some."""
    if method_class(key).card.signal == "unlabelled":
        kwargs["unlabelled"] = colours(3, seed=3)
    return quick(key).fit(backbone, support, **kwargs)


@pytest.fixture(scope="module")
def fitted(backbone, support):
    """Each method fitted once for all tests that only look at it."""
    cache: dict[str, Method] = {}
    return lambda key: cache.setdefault(key, fit(key, backbone, support))


@pytest.mark.parametrize("key", KEYS)
def test_card_and_hyperparameters(key):
    cls = method_class(key)
    card = cls.card
    assert card.key == key == key.lower()
    assert cls.__module__.rsplit(".", 1)[1] == key.replace("++", "_plus_plus").replace("-", "_"), (
        "a file is named after its key"
    )
    assert card.title
    assert card.family
    assert card.task
    assert card.trains
    assert card.arxiv is None or len(card.arxiv.split(".")) == 2
    assert card.signal in ("none", "labels", "unlabelled")
    assert card.unlabelled or card.signal != "unlabelled"
    assert cls.__doc__
    module_doc = __import__(cls.__module__, fromlist=["_"]).__doc__ or ""
    assert card.arxiv is None or card.arxiv in module_doc, "the docstring cites the paper"
    for f in dataclasses.fields(cls):
        assert f.metadata.get("doc"), f"{key}: {f.name} says what it is"
    for name, values in {**cls.search_space, **{k: (v,) for k, v in cls.tiny.items()}}.items():
        for value in values:
            create(key, **{name: value})


@pytest.mark.parametrize("key", KEYS)
def test_bad_hyperparameters_are_refused_by_name(key):
    with pytest.raises(ClipadaptError, match="no_such_setting"):
        create(key, no_such_setting=1)
    for f in dataclasses.fields(method_class(key)):
        if f.metadata.get("low") is not None:
            with pytest.raises(ClipadaptError, match=f.name):
                create(key, **{f.name: f.metadata["low"] - 1})
        if f.metadata.get("choices"):
            with pytest.raises(ClipadaptError, match=f.name):
                create(key, **{f.name: "nonsense"})


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
    # a single picture in any form, and none at all
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
def test_deterministic_by_seed(key, backbone, support, queries, fitted):
    torch.manual_seed(123)  # global state must not matter
    again = fit(key, backbone, support)
    np.testing.assert_array_equal(again.predict_proba(queries), fitted(key).predict_proba(queries))


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
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    again = loaded.save(tmp_path / "again")
    assert files == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in again.iterdir()}


@pytest.mark.parametrize("key", KEYS)
def test_order_of_classes_does_not_matter(key, backbone, support, queries, fitted):
    order = [2, 0, 3, 1]
    names = [support.class_names[c] for c in order]
    permuted = dataclasses.replace(support, labels=[order.index(label) for label in support.labels], class_names=names)
    model = fit(key, backbone, permuted)
    np.testing.assert_allclose(model.predict_proba(queries), fitted(key).predict_proba(queries)[:, order], atol=2e-3)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("shape", ["one-shot", "missing-class", "uneven"])
def test_odd_support_sets(key, shape, backbone, support, queries):
    rows = {"one-shot": range(0, 16, 4), "missing-class": range(12), "uneven": [0, 1, 2, 3, 4, 8, 12]}[shape]
    model = fit(key, backbone, support.select(rows))
    probabilities = model.predict_proba(queries)
    assert probabilities.shape == (8, 4)
    assert np.isfinite(probabilities).all()
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize("key", KEYS)
def test_an_empty_support_set_is_refused(key, backbone, support):
    if method_class(key).card.signal != "labels":
        model = fit(key, backbone, class_names=support.class_names)
        assert model.class_names_ == support.class_names
    else:
        with pytest.raises(ClipadaptError, match="labelled pictures"):
            fit(key, backbone, support.select([]))
        with pytest.raises(ClipadaptError, match="labelled pictures"):
            fit(key, backbone, class_names=support.class_names)
    with pytest.raises(ClipadaptError, match="support set or class_names"):
        fit(key, backbone)


@pytest.mark.parametrize("key", KEYS)
def test_unlabelled_pictures(key, backbone, support, queries):
    """They do instead of labelled ones where a card says that they are of use; elsewhere they are refused."""
    card, names = method_class(key).card, support.class_names
    if not card.unlabelled:
        with pytest.raises(ClipadaptError, match="no use for unlabelled"):
            quick(key).fit(backbone, support, unlabelled=queries)
        return
    probabilities = [
        quick(key).fit(backbone, unlabelled=pictures, class_names=names).predict_proba(queries)
        for pictures in (support, support.items)
    ]
    assert probabilities[0].shape == (8, 4)
    np.testing.assert_array_equal(probabilities[0], probabilities[1], "labels are not looked at")
    if card.signal == "unlabelled":
        with pytest.raises(ClipadaptError, match="learns from unlabelled pictures"):
            quick(key).fit(backbone, support)


@pytest.mark.parametrize("key", KEYS)
def test_refuses_a_backbone_that_lacks_what_it_requires(key, backbone, support, monkeypatch):
    requires = method_class(key).card.requires
    assert requires <= backbone.capabilities
    monkeypatch.setattr(Backbone, "capabilities", property(lambda self: frozenset()))
    if requires:
        with pytest.raises(ClipadaptError, match=min(requires)):
            fit(key, backbone, support)
    else:
        fit(key, backbone, support)


@pytest.mark.parametrize("key", KEYS)
def test_the_backbone_stays_as_it_was(key, support, queries):
    backbone = load_backbone(tiny_clip())
    before = backbone.fingerprint
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in backbone.model.modules()]
    model = fit(key, backbone, support)
    model.predict(queries)
    assert backbone.fingerprint == before
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert not backbone.model.training
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in backbone.model.modules()]
    changes = isinstance(model, WeightMethod)
    assert (model.backbone_ is not backbone) == changes, "only a weight method has a backbone of its own"
    assert (model.backbone_.fingerprint != before) == changes


@pytest.mark.parametrize("key", KEYS)
def test_trained_parameters_are_counted_right(key, backbone, support):
    counts = []
    handle = register_optimizer_step_pre_hook(
        lambda optimizer, *_: counts.append(sum(p.numel() for g in optimizer.param_groups for p in g["params"]))
    )
    model = fit(key, backbone, support)
    handle.remove()
    if counts:
        assert model.trained_parameters == counts[-1]
    elif model.card.trains == "nothing":
        assert model.trained_parameters == 0
    else:
        assert model.trained_parameters > 0


@pytest.mark.parametrize("key", KEYS)
def test_training_reports_every_step(key, backbone, support):
    reports: list[dict] = []
    fit(key, backbone, support, report=reports.append)
    for i, line in enumerate(reports):
        assert line["step"] == i + 1
        assert line["steps"] == len(reports)
        assert math.isfinite(line["loss"])


@pytest.mark.parametrize("key", [k for k in KEYS if issubclass(method_class(k), FeatureMethod)])
def test_features_alone_suffice(key, tmp_path):
    """torch or numpy, any length of the rows, no backbone; saved and loaded without one."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((3, 16))
    labels = np.repeat(np.arange(3), 5)
    x = centres[labels] + 0.3 * rng.standard_normal((15, 16))
    t = centres + 0.5 * rng.standard_normal((3, 16))
    more = {"unlabelled": x} if method_class(key).card.signal == "unlabelled" else {}
    head = quick(key).fit_features(x, labels, t, logit_scale=20.0, **more)
    logits = head.logits(x)
    assert isinstance(logits, np.ndarray)
    assert logits.shape == (15, 3)
    assert (logits.argmax(1) == labels).mean() == 1
    other = quick(key).fit_features(
        torch.from_numpy(5 * x), torch.from_numpy(labels), torch.from_numpy(t), logit_scale=20.0, **more
    )
    torch.testing.assert_close(other.logits(torch.from_numpy(x)), torch.from_numpy(logits), atol=1e-4, rtol=1e-4)
    loaded = clipadapt.load(head.save(tmp_path / "head"))
    np.testing.assert_array_equal(loaded.logits(x), logits)
    assert head.logits(np.zeros((0, 16))).shape == (0, 3)
    with pytest.raises(ClipadaptError, match="shape"):
        head.logits(np.zeros((2, 17)))
    with pytest.raises(ClipadaptError, match="features, not pictures"):
        head.predict([Image.new("RGB", (8, 8))])
    for wrong in (labels[:-1], labels - 1, labels + 1, labels + 0.5):
        with pytest.raises(ClipadaptError, match="labels must"):
            quick(key).fit_features(x, wrong, t, **more)
    with pytest.raises(ClipadaptError, match="not finite"):
        quick(key).fit_features(np.where(x > 1, np.nan, x), labels, t, **more)


@pytest.mark.parametrize("key", [k for k in KEYS if issubclass(method_class(k), WeightMethod)])
def test_adapted_towers_export_as_a_plain_folder(key, fitted, queries, tmp_path):
    model = fitted(key)
    model.export(tmp_path / "towers")
    exported = load_backbone(tmp_path / "towers")
    pixels = torch.stack([exported.preprocess(item.open()) for item in queries.items])
    with torch.no_grad():
        torch.testing.assert_close(exported.encode_images(pixels), model.backbone_.encode_images(pixels))
    assert exported.fingerprint == model.backbone_.fingerprint


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("key", KEYS)
def test_an_interrupted_fit_goes_on(key, backbone, support, queries, fitted, tmp_path, monkeypatch):
    """The same call ends with the same model, whatever of the training was kept."""
    monkeypatch.setattr("clipadapt.training.loop.SAVE_EVERY", 0.0)
    seen: list[dict] = []
    fit(key, backbone, support, report=seen.append)

    def interrupt(line: dict) -> None:
        if line["step"] == seen[-1]["steps"] // 2 + 1:
            raise Interrupted

    if seen:
        with pytest.raises(Interrupted):
            fit(key, backbone, support, report=interrupt, resume=tmp_path / "run")
    model = fit(key, backbone, support, resume=tmp_path / "run")
    np.testing.assert_array_equal(model.predict_proba(queries), fitted(key).predict_proba(queries))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "nothing is left of a fit that ended"


@pytest.mark.parametrize("key", KEYS)
def test_new_classes(key, backbone, support, queries, fitted, tmp_path):
    """A fitted method serves other names without refitting, or says that it cannot; itself it stays as it was."""
    model, before = fitted(key), fitted(key).predict_proba(queries)
    names = ["large cat", "house", support.class_names[1], "star", "dog"]
    if not model.card.new_classes:
        with pytest.raises(ClipadaptError, match="ties what it learns to its classes"):
            model.with_classes(names)
        return
    if getattr(model, "class_specific", False):
        model = create(key, **{**method_class(key).tiny, "class_specific": False}).fit(backbone, support)
        before = model.predict_proba(queries)
    other = model.with_classes(names)
    probabilities = other.predict_proba(queries)
    assert probabilities.shape == (8, 5)
    assert other.class_names_ == names
    assert other.trained_parameters == model.trained_parameters
    np.testing.assert_allclose(
        model.with_classes(names[::-1]).predict_proba(queries), probabilities[:, ::-1], atol=1e-4
    )
    np.testing.assert_allclose(model.with_classes(support.class_names).predict_proba(queries), before, atol=1e-5)
    loaded = clipadapt.load(other.save(tmp_path / "other"), backbone)
    np.testing.assert_allclose(loaded.predict_proba(queries), probabilities, atol=1e-6)
    np.testing.assert_array_equal(model.predict_proba(queries), before)
    with pytest.raises(ClipadaptError, match="two classes"):
        model.with_classes(["one"])


@pytest.fixture(scope="module")
def digits() -> tuple[Backbone, Dataset, Dataset]:
    """The small real task: scikit-learn's handwritten digits, 8 shots, on the embedded model."""
    train, test = handwritten_digits().split(test=0.2, seed=1)
    return load_backbone(), train.few_shot(8, seed=1), test


@pytest.mark.parametrize("key", [k for k in KEYS if method_class(k).card.signal == "labels"])
def test_beats_zero_shot_on_a_small_real_task(key, digits):
    """With the setting that cross-validation inside the support set chooses, where the paper searches for one."""
    backbone, support, test = digits
    zero_shot = create("zero-shot").fit(backbone, support).score(test)
    method = quick(key)
    if method.search_space:
        overrides = {key: method_class(key).tiny}
        trials = select(backbone, support, keys=[key], folds=2, budget=math.inf, overrides=overrides).trials
        method = trials[1].create()
    assert method.fit(backbone, support).score(test) > zero_shot + 0.05


@pytest.mark.parametrize("key", KEYS)
def test_embeddings_know_which_models_share_them(key, backbone, fitted, queries, tmp_path):
    """The fingerprint of the image side is that of the plain backbone exactly where pictures are encoded as by it."""
    method = fitted(key)
    try:
        tower = method.image_tower()
    except ClipadaptError as error:
        assert "no point of the space of texts" in str(error)  # noqa: PT017
        return
    pixels = torch.stack([backbone.preprocess(item.open()) for item in queries.items])
    with torch.no_grad():
        features = tower.encode_images(pixels)
        same = torch.equal(features, backbone.encode_images(pixels))
    assert features.shape == (len(pixels), tower.dim)
    assert (method.image_fingerprint == backbone.image_fingerprint) == same
    assert clipadapt.load(method.save(tmp_path), backbone=backbone).image_fingerprint == method.image_fingerprint


@pytest.mark.parametrize("key", KEYS)
def test_texts_are_encoded_in_the_space_of_pictures(key, fitted):
    method = fitted(key)
    try:
        texts = method.encode_texts(["a red circle", "a cat"])
    except ClipadaptError as error:
        assert "depends on the picture" in str(error) or "class_specific=True" in str(error)  # noqa: PT017
        return
    assert texts.shape == (2, method.backbone_.dim)
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(method.encode_texts(["a cat"]), texts[1:], atol=1e-5, rtol=0)
