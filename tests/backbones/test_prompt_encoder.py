"""The prompt encoder equals the plain computation, features and gradients, in every layout; and says if it cannot."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipadapt.backbones import Backbone, Insertion, load_backbone
from clipadapt.backbones import prompt_encoder as module
from clipadapt.errors import BackboneError
from clipadapt.nn.prompts import ClassPrompts
from tests.tiny import tiny

NAMES = ["cat", "small red house", "dog", "large blue star", "green circle", "cat"]  # of several lengths, one twice


def full_length(backbone: Backbone, ids: Tensor, insertions: list[Insertion]) -> Tensor:
    """The plain computation: every prompt alone in its row, padded to the context length, nothing cut or shared."""
    padded = torch.nn.functional.pad(ids, (0, backbone.context_length - ids.shape[1]))
    with backbone.inserted(text=insertions):
        return backbone.model.get_text_features(padded).pooler_output


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compare(backbone: Backbone, prompts: ClassPrompts, insertions: list[Insertion], shared: int | None) -> None:
    """Features and gradients to every inserted token, relative to the largest value, within 1e-5."""
    tokens = [i.tokens for i in insertions]
    groups = max((len(t) for t in tokens if t.ndim == 4), default=0)
    classes = len(prompts.ids)
    if groups:  # one group after the other, each as a plain batch
        plain = torch.stack(
            [
                full_length(
                    backbone,
                    prompts.ids,
                    [
                        Insertion(
                            i.tokens[g % len(i.tokens)].squeeze(0) if i.tokens.ndim == 4 else i.tokens, i.at, i.layer
                        )
                        for i in insertions
                    ],
                )
                for g in range(groups)
            ]
        )
    else:
        plain = full_length(backbone, prompts.ids, insertions)
    ours = prompts.encoder(insertions, normalize=False)
    assert ours.shape == plain.shape == ((groups, classes, backbone.dim) if groups else (classes, backbone.dim))
    scale = plain.abs().max()
    assert (ours - plain).abs().max() <= 1e-5 * scale
    weights = normal(*plain.shape, seed=9)
    expected = torch.autograd.grad((normalize(plain, dim=-1) * weights).sum(), tokens)
    found = torch.autograd.grad((prompts.encoder(insertions) * weights).sum(), tokens)
    for ours_, plain_ in zip(found, expected, strict=True):
        assert plain_.abs().max() > 0
        assert (ours_ - plain_).abs().max() <= 1e-5 * plain_.abs().max()
    if shared is not None:
        assert prompts.encoder.explain(insertions).startswith(f"{shared} shared rows")


@pytest.fixture(params=["clip", "metaclip_2"])
def causal(request) -> Backbone:
    return load_backbone(tiny(request.param))


def vectors(backbone: Backbone, *shape: int, seed: int = 1) -> Tensor:
    return (0.3 * normal(*shape, backbone.width("text"), seed=seed)).requires_grad_()


@pytest.mark.parametrize(("position", "shared"), [("end", 5), ("middle", 3), ("front", 1)])
@pytest.mark.parametrize("class_specific", [False, True])
def test_every_coop_layout(causal, position, shared, class_specific):
    prompts = ClassPrompts(causal, NAMES, 4, position=position)
    classes = (len(NAMES),) * class_specific
    starts = len(causal.tokenize([""])[0]) - 1  # MetaCLIP 2's start token
    shared = starts if class_specific else shared - 1 + starts
    compare(causal, prompts, [Insertion(vectors(causal, *classes, 4), at=prompts.rows)], shared)


def test_a_context_for_each_picture(causal):
    """CoCoOp: groups share a prefix of their own."""
    prompts = ClassPrompts(causal, NAMES, 3)
    compare(causal, prompts, [Insertion(vectors(causal, 4, 1, 3), at=prompts.rows)], 4)


def test_a_context_for_each_class_and_picture(causal):
    prompts = ClassPrompts(causal, NAMES, 2)
    compare(causal, prompts, [Insertion(vectors(causal, 3, len(NAMES), 2), at=prompts.rows)], 1)


def test_deep_prompts(causal):
    """MaPLe: the context rows are overwritten again before later blocks; two fixed words belong to the prefix."""
    prompts = ClassPrompts(causal, NAMES, 2, words="of a")
    insertions = [Insertion(vectors(causal, 2, seed=s), at=prompts.rows, layer=s or "input") for s in range(3)]
    compare(causal, prompts, insertions, 5)


def test_deep_prompts_of_each_picture(causal):
    """The input is the same for all groups, a later layer is not."""
    prompts = ClassPrompts(causal, NAMES, 2)
    insertions = [
        Insertion(vectors(causal, 2), at=prompts.rows),
        Insertion(vectors(causal, 3, 1, 2, seed=2), at=prompts.rows, layer=1),
    ]
    compare(causal, prompts, insertions, 3)


def test_deep_prompts_of_each_class(causal):
    """TCP: shared at the input, a set for each class before a later block; so nothing but the start is shared."""
    prompts = ClassPrompts(causal, NAMES, 3)
    insertions = [
        Insertion(vectors(causal, 3), at=prompts.rows),
        Insertion(vectors(causal, len(NAMES), 3, seed=2), at=prompts.rows, layer=1),
    ]
    compare(causal, prompts, insertions, 1)
    assert "tokens at layer 1 differ from prompt to prompt" in prompts.encoder.explain(insertions)


@pytest.mark.parametrize("layer", ["input", 0, 1])
def test_rows_inserted_behind_the_start(causal, layer):
    """MMRL: the shared rows become more."""
    prompts = ClassPrompts(causal, NAMES, 2)
    insertions = [
        Insertion(vectors(causal, 2), at=prompts.rows),
        Insertion(vectors(causal, 2, seed=2), at=1, layer=layer, mode="insert"),
    ]
    compare(causal, prompts, insertions, None)


def test_rows_inserted_elsewhere_compute_plainly(causal):
    """Rows put in between that differ from prompt to prompt, or stand behind the shared ones, are no shared rows."""
    prompts = ClassPrompts(causal, NAMES, 2)
    context = Insertion(vectors(causal, 2), at=prompts.rows)
    for insertion, why in (
        (
            Insertion(vectors(causal, len(NAMES), 2, seed=2), at=1, layer=1, mode="insert"),
            "differ from prompt to prompt",
        ),
        (Insertion(vectors(causal, 2, seed=2), at=4, layer=1, mode="insert"), "behind the shared ones"),
    ):
        assert prompts.encoder.explain([context, insertion]).endswith(why)
        compare(causal, prompts, [context, insertion], None)


def test_one_prompt_and_none_inserted(causal):
    prompts = ClassPrompts(causal, ["cat"], 2)
    compare(causal, prompts, [Insertion(vectors(causal, 2), at=prompts.rows)], None)
    plain = causal.encode_texts(["a photo of a cat.", "a photo of a small dog."])
    encoder = causal.prompt_encoder(causal.tokenize(["a photo of a cat.", "a photo of a small dog."]))
    torch.testing.assert_close(encoder(), plain)


@pytest.mark.parametrize("memory", [0, 1 << 40])
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_chunks_and_recomputation_change_nothing(causal, monkeypatch, memory, rows):
    monkeypatch.setitem(module.CHUNK_ROWS, "cpu", rows)
    prompts = ClassPrompts(causal, NAMES, 2)
    prompts.encoder = causal.prompt_encoder(prompts.ids, memory=memory)
    per_class = vectors(causal, len(NAMES), 2, seed=2)
    compare(causal, prompts, [Insertion(vectors(causal, 2), at=prompts.rows)], None)
    compare(causal, prompts, [Insertion(per_class, at=prompts.rows)], None)


def test_recomputation_keeps_less(causal):
    """Without memory to keep activations, the graph holds only the inputs of each chunk."""
    prompts = ClassPrompts(causal, NAMES * 20, 2)
    kept = {}
    for memory in (0, 1 << 40):
        encoder, sizes = causal.prompt_encoder(prompts.ids, memory=memory), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            encoder([Insertion(vectors(causal, 2), at=prompts.rows)])
        kept[memory] = sum(sizes)
    assert kept[0] < 0.2 * kept[1 << 40]


def test_gradients_reach_weights_that_train(causal):
    """With low-rank updates in the text tower, say, the same encoder serves."""
    prompts = ClassPrompts(causal, NAMES, 2)
    insertions = [Insertion(vectors(causal, 2), at=prompts.rows)]
    weight = causal.model.get_parameter(f"{causal.target_modules('text', ('fc1',), [1])[0]}.weight").requires_grad_()
    found = torch.autograd.grad(prompts.encoder(insertions, normalize=False).sum(), weight)[0]
    expected = torch.autograd.grad(full_length(causal, prompts.ids, insertions).sum(), weight)[0]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", ["siglip", "siglip2", "altclip", "chinese_clip"])
def test_other_families_compute_plainly(family):
    backbone = load_backbone(tiny(family))
    prompts = ClassPrompts(backbone, NAMES, 2)
    assert prompts.encoder.explain() == f"plain: in the text tower of {family} every row sees the later ones"
    for shape in ((2,), (len(NAMES), 2)):
        context = vectors(backbone, *shape)
        with backbone.inserted(text=[Insertion(context, at=prompts.rows)]):
            plain = backbone.encode_tokens(prompts.ids)
        torch.testing.assert_close(prompts.encode(context), plain)
    grouped = vectors(backbone, 3, 1, 2)
    each = torch.stack([prompts.encode(context[0]) for context in grouped])
    torch.testing.assert_close(prompts.encode(grouped), each, rtol=0, atol=1e-5)


def test_dropout_and_changed_towers_compute_plainly(causal):
    prompts = ClassPrompts(causal, NAMES, 2)
    insertion = Insertion(vectors(causal, 2), at=prompts.rows)
    with causal.inserted(text=[Insertion(vectors(causal, 2), at=1)]):
        assert prompts.encoder.explain() == "plain: tokens are already inserted into the text tower"
    with causal.attention("vv", tower="text"):
        assert prompts.encoder.explain() == "plain: the text tower's attention is changed"
        plain = full_length(causal, prompts.ids, [insertion])
        torch.testing.assert_close(prompts.encoder([insertion], normalize=False), plain)
    dropout = torch.nn.Dropout(0.5)
    causal.blocks("text")[0].add_module("dropout", dropout)
    assert prompts.encoder.explain() == "plain: dropout draws other masks for each prompt"
    dropout.eval()
    assert prompts.encoder.explain([insertion]).startswith("3 shared rows")


def test_errors(causal):
    encoder = causal.prompt_encoder(causal.tokenize(["a cat", "a dog"]))
    with pytest.raises(BackboneError, match=r"Tokens for 2 prompts must be .* but are \(3, 1, 24\)"):
        encoder([Insertion(torch.zeros(3, 1, 24), at=1)])
    with pytest.raises(BackboneError, match="Prompts must be"):
        causal.prompt_encoder(torch.zeros(0, 3, dtype=torch.int64))
    with pytest.raises(BackboneError, match=r"Tokens of the text tower must be"):
        causal.prompt_encoder(causal.tokenize(["a cat"]))([Insertion(torch.zeros(2, 7), at=1)])
