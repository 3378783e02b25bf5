"""Updates of every kind: attached they leave no trace, merged they are the same, and they keep what was trained.

Each is compared with the plain computation: with peft, a trained copy, `functional_call`, and what methods save.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, linear

from clipadapt.backbones import load_backbone
from clipadapt.backbones.weights import weight_names
from clipadapt.errors import ClipadaptError
from clipadapt.methods import create
from clipadapt.methods.kinds.weights import class_encoder, tower_weights
from clipadapt.methods.robust_fine_tuning.wise_ft import interpolate
from clipadapt.nn.updates import Bottlenecks, Full, LinearAdapters, LowRank, Sparse
from clipadapt.training.loop import seeded
from tests.images import colours
from tests.pairs import inject, merged
from tests.tiny import tiny, tiny_clip

NAMES = ["red cat", "blue dog", "green star"]
LABELS = torch.tensor([0, 1, 2, 0, 1])


@pytest.fixture(scope="module")
def backbone():
    """A copy: weights just read from a file are not aligned in memory, which moves the last bit of some products."""
    return load_backbone(tiny_clip()).copy()


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def support():
    return colours(3, seed=1)


def tower_names(backbone) -> list[str]:
    return [name for name in weight_names(backbone.model) if name != "logit_scale"]


def some_places(backbone) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    state = backbone.weights()
    return {n: torch.randperm(state[n].numel(), generator=generator)[:3].sort().values for n in tower_names(backbone)}


def make(kind: str, backbone):
    """An update, and how it is restored from its tensors."""
    model, sites = backbone.model, backbone.target_modules(kinds=("o", "fc2"))
    if kind == "full":
        return Full(model, tower_names(backbone)), lambda kept: Full.restore(kept, model)
    if kind == "sparse":
        return Sparse(model, some_places(backbone)), lambda kept: Sparse.restore(kept, model)
    cls, settings = {
        "low-rank": (LowRank, {"rank": 2, "scaling": 0.7, "dropout": 0.3}),
        "linear": (LinearAdapters, {"rank": 2, "scale": 0.5, "drop": 0.4}),
        "linear-full": (LinearAdapters, {"scale": 0.5}),
        "bottleneck": (Bottlenecks, {"reduction": 8}),
        "bottleneck-shared": (Bottlenecks, {"reduction": 8, "share": "up"}),
    }[kind]
    return cls(model, sites, **settings), lambda kept: cls.restore(kept, model, sites, **settings)


MERGEABLE = ["full", "sparse", "low-rank", "linear", "linear-full"]
KINDS = [*MERGEABLE, "bottleneck", "bottleneck-shared"]


@torch.no_grad()
def move(update, std: float = 0.05):
    """Other values than at the start."""
    generator = torch.Generator().manual_seed(2)
    for parameter in update.parameters():
        parameter += std * torch.randn(parameter.shape, generator=generator)
    return update


def encode(backbone, pixels):
    return torch.cat([backbone.encode_images(pixels), backbone.encode_texts(NAMES)])


def traces(model: nn.Module) -> list:
    return [
        (name, type(module), len(module._forward_hooks), len(module._forward_pre_hooks), sorted(vars(module)))
        for name, module in model.named_modules()
    ] + [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]


# -- every kind -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["clip", "siglip", "altclip"])
def test_attached_changes_what_is_computed_and_leaves_no_trace(kind, family, pixels):
    backbone = load_backbone(tiny(family))
    before, fingerprint, plain = traces(backbone.model), backbone.fingerprint, encode(backbone, pixels)
    update, _ = make(kind, backbone)
    update.eval()
    with update.attached(backbone.model):
        torch.testing.assert_close(encode(backbone, pixels), plain, rtol=0, atol=0, msg="an update starts as nothing")
    move(update)
    with update.attached(backbone.model):
        changed = encode(backbone, pixels)
        assert backbone.fingerprint == fingerprint, "what the model holds is not what it computes with"
    assert (changed - plain).abs().amax(1).min() > 1e-4
    torch.testing.assert_close(encode(backbone, pixels), plain, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="stop"), update.attached(backbone.model):
        raise RuntimeError("stop")
    assert traces(backbone.model) == before
    assert backbone.fingerprint == fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_update_only_and_training_can_stay_inside(kind, pixels):
    """The model's weights ask for gradients before and after; several steps are made in one context."""
    backbone = load_backbone(tiny_clip())
    backbone.model.requires_grad_()
    before = traces(backbone.model)
    update = move(make(kind, backbone)[0])
    optimizer = torch.optim.SGD(update.parameters(), lr=0.1)
    losses = []
    with update.eval().attached(backbone.model):
        for _ in range(4):
            optimizer.zero_grad()
            encode(backbone, pixels)[0, 0].backward()
            encode(backbone, pixels)[:, 0].sum().backward()  # a second graph of the same values
            assert all(p.grad is None for p in backbone.model.parameters())
            losses.append(encode(backbone, pixels)[:, 0].sum().item())
            optimizer.step()
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]
    assert traces(backbone.model) == before
    expected = sum(p.grad is not None for p in update.parameters())
    assert expected >= 0.9 * len(list(update.parameters()))  # some token vectors are of other words


@pytest.mark.parametrize("kind", MERGEABLE)
@pytest.mark.parametrize("family", ["clip", "siglip", "chinese_clip"])
def test_merged_equals_attached(kind, family, pixels):
    backbone = load_backbone(tiny(family))
    update = move(make(kind, backbone)[0]).eval()
    with update.attached(backbone.model), torch.no_grad():
        attached = encode(backbone, pixels)
    weights, state = update.merged(backbone.model), backbone.model.state_dict()
    other = backbone.copy()
    assert not other.model.load_state_dict(weights, strict=False).unexpected_keys
    torch.testing.assert_close(encode(other, pixels), attached, rtol=0, atol=1e-5)
    assert update.mergeable
    assert not any(tensor.requires_grad for tensor in weights.values())
    nothing, half = update.merged(backbone.model, 0.0), update.merged(backbone.model, 0.5)
    line = interpolate({name: state[name] for name in weights}, weights, 0.5)
    for name, tensor in weights.items():
        torch.testing.assert_close(nothing[name], state[name], rtol=0, atol=0)
        torch.testing.assert_close(half[name], line[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(update.changes()[name](state[name]), tensor, rtol=0, atol=0)


def test_bottlenecks_do_not_merge(backbone):
    update, _ = make("bottleneck", backbone)
    assert not update.mergeable
    for act in (update.changes, lambda: update.merged(backbone.model)):
        with pytest.raises(ClipadaptError, match="Bottlenecks cannot be merged into the model's weights; attach it"):
            act()


@pytest.mark.parametrize("kind", KINDS)
def test_kept_and_restored_without_drawing(kind, backbone, pixels):
    update, restore = make(kind, backbone)
    move(update)
    kept = update.tensors()
    assert not any(tensor.requires_grad for tensor in kept.values())
    numbers = {name: tensor for name, tensor in kept.items() if not name.endswith(".places")}
    assert sum(tensor.numel() for tensor in numbers.values()) == update.count
    assert update.by_name().keys() == numbers.keys()
    for name, parameter in update.by_name().items():
        assert torch.equal(parameter, kept[name])
        assert parameter.data_ptr() != kept[name].data_ptr()
    state = torch.get_rng_state()
    restored = restore(kept)
    assert torch.equal(torch.get_rng_state(), state)
    fresh = make(kind, backbone)[0].load(kept)
    for again in (restored, fresh):
        assert not any(p.requires_grad for p in again.parameters())
        assert not any(module.training for module in again.modules())
        assert again.tensors().keys() == kept.keys()
        assert all(torch.equal(tensor, kept[name]) for name, tensor in again.tensors().items())
        features = []
        for one in (update.eval(), again):
            with one.attached(backbone.model), torch.no_grad():
                features.append(encode(backbone, pixels))
        torch.testing.assert_close(*features, rtol=0, atol=0)
    assert [*restored.by_name()] == [*update.by_name()]


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_do_not_fit_are_named(kind, backbone):
    update, restore = make(kind, backbone)
    kept = update.tensors()
    name = [*kept][1]
    with pytest.raises(ClipadaptError, match=rf"'{re.escape(name)}' of this \w+ is missing"):
        update.load({n: t for n, t in kept.items() if n != name})
    with pytest.raises(ClipadaptError, match=rf"'{re.escape(name)}' of this \w+ must have shape \("):
        update.load({**kept, name: torch.zeros(99)})
    with pytest.raises(ClipadaptError, match=r"has no tensor called 'odd\.A'"):
        update.load({**kept, "odd.A": torch.zeros(2)})
    with pytest.raises(ClipadaptError, match=r"odd"):
        restore({**kept, "odd.A": torch.zeros(2)})


def test_counts(backbone):
    widths = [backbone.model.get_submodule(site).out_features for site in backbone.target_modules(kinds=("o", "fc2"))]
    ins = [backbone.model.get_submodule(site).in_features for site in backbone.target_modules(kinds=("o", "fc2"))]
    state = dict(backbone.model.named_parameters())
    expected = {
        "full": sum(state[name].numel() for name in tower_names(backbone)),
        "sparse": sum(len(where) for where in some_places(backbone).values()),
        "low-rank": sum(2 * (i + o) for i, o in zip(ins, widths, strict=True)),
        "linear": sum(1 + 2 * 2 * w for w in widths),
        "linear-full": sum(1 + w * w for w in widths),
        "bottleneck": sum(2 * w * (w // 8) + w + w // 8 for w in widths),
    }
    for kind, count in expected.items():
        assert make(kind, backbone)[0].count == count, kind


@pytest.mark.parametrize("outer", ["full", "sparse", "low-rank", "bottleneck"])
@pytest.mark.parametrize("inner", ["full", "sparse", "low-rank", "linear"])
def test_nested_updates(outer, inner, pixels):
    """Weights change first, whichever is outside, then sites: the same as merging the first into a model."""
    backbone = load_backbone(tiny_clip())
    before = traces(backbone.model)
    updates = [move(make(outer, backbone)[0]).eval(), move(make(inner, backbone)[0], 0.1).eval()]
    with torch.no_grad():
        with updates[0].attached(backbone.model):
            alone = encode(backbone, pixels)
            with updates[1].attached(backbone.model):
                both = encode(backbone, pixels)
            torch.testing.assert_close(encode(backbone, pixels), alone, rtol=0, atol=0)
        assert (both - alone).abs().max() > 1e-3
        first, second = sorted(updates, key=lambda update: not isinstance(update, Full | Sparse))
        if first.mergeable:
            other = backbone.copy()
            other.model.load_state_dict(first.merged(backbone.model), strict=False)
            with second.attached(other.model):
                torch.testing.assert_close(both, encode(other, pixels), rtol=0, atol=1e-5)
    assert traces(backbone.model) == before


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_backbone_that_makes_weights_at_each_use(kind, pixels):
    """A LoRA of a LoRA, and so on: as on a copy in which the first one is plain weights."""
    backbone = load_backbone(tiny_clip()).copy()
    first = move(make("low-rank", backbone)[0])
    lazy = backbone.with_weights(first.changes())
    plain = lazy.copy()
    before, features = traces(lazy.model), encode(lazy, pixels)
    assert torch.equal(features, encode(plain, pixels))
    made = []
    for one in (lazy, plain):
        with seeded(5):
            made.append(move(make(kind, one)[0], 0.1).eval())
    (ours, theirs), results = made, []
    for update, one in ((ours, lazy), (theirs, plain)):
        with update.attached(one.model):
            found = encode(one, pixels)
            found[:, 0].sum().backward()
            assert torch.equal(one.copy().encode_images(pixels), features[: len(pixels)]), "copies are not attached"
            assert torch.equal(one.with_weights({}).encode_images(pixels), features[: len(pixels)])
            assert one.fingerprint == plain.fingerprint
        results.append(found.detach())
    assert torch.equal(*results)
    assert (results[0] - features).abs().max() > 1e-3
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None)
        assert mine.grad is None or torch.equal(mine.grad, other.grad)
    assert traces(lazy.model) == before
    assert torch.equal(encode(lazy, pixels), features)
    if ours.mergeable:
        merged_weights = theirs.merged(plain.model)
        assert all(torch.equal(tensor, merged_weights[name]) for name, tensor in ours.merged(lazy.model).items())
        both, dense = lazy.with_weights(ours.changes()), plain.with_weights(merged_weights)
        assert torch.equal(encode(both, pixels), encode(dense, pixels))
        assert both.fingerprint == dense.fingerprint
        lost = {name for name, _ in plain.model.named_parameters()} - {n for n, _ in both.model.named_parameters()}
        assert lost == {*first.changes(), *ours.changes()}, "they pile up"


def test_weights_made_at_each_use_are_among_those_of_the_towers():
    backbone = load_backbone(tiny_clip())
    lazy = backbone.with_weights(make("low-rank", backbone)[0].changes())
    for tower in ("vision", "text", "both"):
        assert tower_weights(lazy, tower) == tower_weights(backbone, tower)
    assert tower_weights(backbone, "both") == [n for n, _ in backbone.model.named_parameters() if n != "logit_scale"]


def test_an_update_is_attached_once(backbone):
    for kind in ("low-rank", "full"):
        update, _ = make(kind, backbone)
        for _ in range(2):
            with (
                update.attached(backbone.model),
                pytest.raises(ClipadaptError, match="attached to the model already"),
                update.attached(backbone.model),
            ):
                pass


def test_bad_input(backbone):
    model = backbone.model
    q = backbone.target_modules(kinds=("q",))[0]
    norm = "vision_model.post_layernorm"
    for make_one in (LowRank, LinearAdapters):
        with pytest.raises(ClipadaptError, match=f"{make_one.__name__} needs linear layers, and '{norm}' is"):
            make_one(model, [norm], 2)
    with pytest.raises(ClipadaptError, match="no module called 'nothing'"):
        LowRank(model, ["nothing"], 2)
    with pytest.raises(ClipadaptError, match="rank of a LowRank must be at least 1"):
        LowRank(model, [q], 0)
    with pytest.raises(ClipadaptError, match="at least one site"):
        LowRank(model, [], 2)
    for name in ("nothing.weight", f"{q}.nothing", "nothing"):
        with pytest.raises(ClipadaptError, match=f"no weight called '{name}'"):
            Full(model, [name])
        with pytest.raises(ClipadaptError, match=f"no weight called '{name}'"):
            Sparse(model, {name: torch.tensor([0])})
    with pytest.raises(ClipadaptError, match="at least one weight"):
        Full(model, [])
    with pytest.raises(ClipadaptError, match=r"must have shape \(\)"):
        Full.restore({"logit_scale": torch.zeros(2)}, model)
    with pytest.raises(ClipadaptError, match="must be from 0 to 0"):
        Sparse(model, {"logit_scale": torch.tensor([1])})
    with pytest.raises(ClipadaptError, match=r"end in \.places and \.values"):
        Sparse.restore({"logit_scale": torch.tensor([1])}, model)
    elsewhere = nn.Linear(2, 2)
    for update in (Full(model, ["logit_scale"]), LowRank(model, [q], 2)):
        with pytest.raises(ClipadaptError, match="The model has no"), update.attached(elsewhere):
            pass
        with update.attached(model):  # what failed does not count as attached
            pass


def test_a_shared_weight_is_changed_wherever_it_is():
    model = nn.ModuleDict({"in": nn.Embedding(5, 3), "out": nn.Linear(3, 5, bias=False)})
    model["out"].weight = model["in"].weight
    update = move(Full(model, ["in.weight"]))
    rows = torch.randn(2, 3)
    with update.attached(model):
        torch.testing.assert_close(model["out"](rows), linear(rows, update.weights[0]))
        assert model["in"].weight is model["out"].weight is update.weights[0]
    assert model["in"].weight is model["out"].weight is not update.weights[0]


# -- as the methods do it ----------------------------------------------------------------------------------------------


def train(backbone, pixels, parameters, loss_of, steps=3, clip=None, **settings) -> list[torch.Tensor]:
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, **settings)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss_of().backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
    return [p.detach().clone() for p in parameters]


def task_loss(backbone, pixels):
    texts = class_encoder(backbone, NAMES, "photo")
    return lambda: cross_entropy(backbone.logit_scale * backbone.encode_images(pixels) @ texts().T, LABELS)


@pytest.mark.parametrize("kinds", [("q", "k", "v"), ("fc2", "o")])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_low_rank_is_pefts_number_for_number(backbone, pixels, kinds, dropout):
    sites = backbone.target_modules("both", kinds)
    with seeded(5):
        adapted = backbone.copy()
        pairs = [*inject(adapted.model, sites, 2, 3.0, dropout).values()]
        start = [p.detach().clone() for p in pairs]
        end = train(adapted, pixels, pairs, task_loss(adapted, pixels), weight_decay=1e-2)
        drawn = torch.rand(4)
    with seeded(5):
        update = LowRank(backbone.model, sites, 2, 3.0 / 2**0.5, dropout)
        assert [*update.by_name()] == [f"{site}.{half}" for site in sites for half in "AB"]
        for ours, theirs in zip(update.parameters(), start, strict=True):
            assert torch.equal(ours, theirs)
        with update.attached(backbone.model):
            ours = train(backbone, pixels, update.parameters(), task_loss(backbone, pixels), weight_decay=1e-2)
        assert torch.equal(torch.rand(4), drawn)
    assert all(torch.equal(a, b) for a, b in zip(ours, end, strict=True))
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(start, end, strict=True))
    with update.eval().attached(backbone.model), torch.no_grad():
        attached = encode(backbone, pixels)
    adapted.model.eval()
    with torch.no_grad():
        assert torch.equal(encode(adapted, pixels), attached)
    by_name = dict(zip(update.tensors(), end, strict=True))
    for name, tensor in merged(backbone.weights(), by_name, 3.0 / 2**0.5).items():
        assert torch.equal(update.merged(backbone.model)[name], tensor)


def test_what_clip_lora_saved_is_restored(backbone, support, pixels):
    model = create("clip-lora", steps_per_shot=1, lr=1e-2, min_scale=1.0).fit(backbone, support)
    sites = [name.removesuffix(".A") for name in model.update_ if name.endswith(".A")]
    update = LowRank.restore(model.update_, backbone.model, sites, rank=2, scaling=1.0 / 2**0.5)
    assert update.count == model.trained_parameters
    weights = update.merged(backbone.model)
    assert weights.keys() == model.changed().keys()
    assert all(torch.equal(tensor, model.changed()[name]) for name, tensor in weights.items())


def test_the_pairs_of_omniview_tuning(backbone, pixels):
    """Rank 8 with scale 1, the projection among the sites."""
    sites = [*backbone.target_modules("vision"), "visual_projection"]
    adapted = backbone.copy()
    with seeded(2):
        pairs = inject(adapted.model, sites, 8, 8**0.5)
    with seeded(2):
        update = LowRank(backbone.model, sites, 8)
    assert all(torch.equal(p, pairs[name]) for name, p in update.by_name().items())
    end = train(adapted, pixels, pairs.values(), lambda: adapted.encode_images(pixels)[:, 0].sum(), clip=1.0)
    with update.attached(backbone.model):
        loss = lambda: backbone.encode_images(pixels)[:, 0].sum()  # noqa: E731
        ours = train(backbone, pixels, update.parameters(), loss, clip=1.0)
    assert all(torch.equal(a, b) for a, b in zip(ours, end, strict=True))
    kept = update.tensors()
    for name, tensor in merged(backbone.weights(), kept, 1.0).items():
        assert torch.equal(update.merged(backbone.model)[name], tensor)


@pytest.mark.parametrize("tower", ["vision", "both"])
def test_full_is_training_a_copy_number_for_number(backbone, pixels, tower):
    adapted, names = backbone.copy(), tower_weights(backbone, tower)
    if tower == "both":  # flyp trains the logit scale as well
        names.append("logit_scale")
    parameters = {name: adapted.model.get_parameter(name).requires_grad_() for name in names}
    update = Full(backbone.model, parameters)
    assert [*update.by_name()] == [*parameters]

    def loss(one):
        texts = class_encoder(one, NAMES, "photo")
        return lambda: cross_entropy(one.model.logit_scale.exp() * one.encode_images(pixels) @ texts().T, LABELS)

    end = train(adapted, pixels, parameters.values(), loss(adapted), clip=1.0, weight_decay=0.1)
    with update.attached(backbone.model):
        ours = train(backbone, pixels, update.parameters(), loss(backbone), clip=1.0, weight_decay=0.1)
    assert all(torch.equal(a, b) for a, b in zip(ours, end, strict=True))
    start = backbone.model.state_dict()
    assert any((start[name] - tensor).abs().max() > 1e-3 for name, tensor in update.tensors().items())
    for name, tensor in interpolate(start, {**start, **update.tensors()}, 0.3).items():
        if name in parameters:
            assert torch.equal(update.merged(backbone.model, 0.3)[name], tensor)


def test_what_fine_tune_saved_is_restored(backbone, support):
    model = create("fine-tune", lr=1e-3, epochs=1, min_scale=1.0).fit(backbone, support)
    update = Full.restore(model.update_, backbone.model)
    assert update.count + model.weight_.numel() == model.trained_parameters
    pixels = torch.stack([backbone.preprocess(item.open()) for item in support.items])
    with update.attached(backbone.model), torch.no_grad():
        assert torch.equal(backbone.encode_images(pixels), model.backbone_.encode_images(pixels))


def test_sparse_is_functional_call_number_for_number(backbone, pixels):
    places, adapted = some_places(backbone), backbone.copy()
    texts = class_encoder(adapted, NAMES, "photo")
    original = adapted.weights()
    values = {name: original[name].flatten()[where].requires_grad_() for name, where in places.items()}

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = adapted.model

        def forward(self, x):
            return adapted.logit_scale * adapted.encode_images(x) @ texts().T

    def put_in() -> dict[str, torch.Tensor]:
        flat = {name: original[name].flatten().index_put((where,), values[name]) for name, where in places.items()}
        return {name: weight.view_as(original[name]) for name, weight in flat.items()}

    def plain():
        weights = {f"model.{name}": weight for name, weight in put_in().items()}
        return cross_entropy(functional_call(Logits(), weights, (pixels,)), LABELS)

    end = train(adapted, pixels, values.values(), plain, clip=1.0, weight_decay=0.0)
    update = Sparse(backbone.model, places)
    with update.attached(backbone.model):
        loss = task_loss(backbone, pixels)
        ours = train(backbone, pixels, update.parameters(), loss, clip=1.0, weight_decay=0.0)
    assert all(torch.equal(a, b) for a, b in zip(ours, end, strict=True))
    expected, weights = put_in(), update.merged(backbone.model)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_what_saft_saved_is_restored(backbone, support):
    model = create("saft", share=0.01, epochs=1, lr=1e-2, min_scale=1.0).fit(backbone, support)
    update = Sparse.restore(model.update_, backbone.model)
    assert update.count == model.trained_parameters
    kept = update.tensors()
    assert kept.keys() == model.update_.keys()
    assert all(torch.equal(kept[name], tensor) for name, tensor in model.update_.items())
    assert {kept[name].dtype for name in kept if name.endswith(".places")} == {torch.int32}
    weights = update.merged(backbone.model)
    assert weights.keys() == model.changed().keys()
    assert all(torch.equal(tensor, model.changed()[name]) for name, tensor in weights.items())


@pytest.mark.parametrize("rank", [4, None])
def test_linear_adapters_are_those_of_r_adapter(backbone, support, rank):
    settings = {"lr": 3e-2, "epochs": 2, "batch_size": 6, "min_scale": 1.0, "rank": rank, "seed": 3}
    model = create("r-adapter", **settings).fit(backbone, support)
    sites = backbone.target_modules(kinds=("o", "fc2"))
    still = create("r-adapter", **{**settings, "lr": 0.0}).fit(backbone, support)  # saves what it starts with
    with seeded(3):
        update = LinearAdapters(backbone.model, sites, rank, scale=0.1, drop=0.2)
    assert [*update.by_name()] == [*still.update_] == [*model.update_]
    for ours, theirs in zip(update.parameters(), still.update_.values(), strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=0, atol=1e-7)  # the mean of equal numbers is rounded
    restored = LinearAdapters.restore(model.update_, backbone.model, sites, rank, scale=0.1, drop=0.2)
    weights = restored.merged(backbone.model, model.scale)
    assert weights.keys() == model.changed().keys()
    assert all(torch.equal(tensor, model.changed()[name]) for name, tensor in weights.items())
    assert restored.count == model.trained_parameters


@pytest.mark.parametrize("share", ["none", "down", "up", "all"])
def test_bottlenecks_are_those_of_vl_adapter(backbone, support, share):
    settings = {"lr": 1e-2, "epochs": 2, "sites": share, "seed": 3}
    model = create("vl-adapter", **settings).fit(backbone, support)
    sites = backbone.target_modules("both", ("o", "fc2"))
    still = create("vl-adapter", **{**settings, "lr": 0.0}).fit(backbone, support)  # saves what it starts with
    with seeded(3):
        update = Bottlenecks(backbone.model, sites, reduction=8, share=share)
    assert [*update.by_name()] == [*still.update_] == [*model.update_]
    assert all(torch.equal(a, b) for a, b in zip(update.parameters(), still.update_.values(), strict=True))
    restored = Bottlenecks.restore(model.update_, backbone.model, sites, reduction=8, share=share)
    assert restored.count == model.trained_parameters
    pixels = torch.stack([backbone.preprocess(item.open()) for item in support.items])
    expected = model.encoder.encode(pixels)
    with restored.attached(backbone.model):
        assert torch.equal(backbone.encode_images(pixels), expected)


def test_the_positions_of_a_framed_image(backbone, pixels):
    """What tecoa learns of a prompt: one changed table of positions."""
    name = "vision_model.embeddings.position_embedding.weight"
    positions = backbone.model.state_dict()[name] + 0.1
    other = backbone.copy()
    other.model.load_state_dict({name: positions}, strict=False)
    with Full.restore({name: positions}, backbone.model).attached(backbone.model):
        assert torch.equal(backbone.encode_images(pixels), other.encode_images(pixels))
        larger = torch.randn(1, 3, 48, 48)  # positions are interpolated from the changed table
        assert torch.equal(backbone.encode_images(larger), other.encode_images(larger))
