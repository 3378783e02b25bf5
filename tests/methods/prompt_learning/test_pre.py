"""PRE against a plain computation of its LSTM and of its prompts one by one, and what its paper states."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from clipadapt.backbones import Backbone, Insertion, load_backbone
from clipadapt.errors import ClipadaptError
from clipadapt.methods import create
from clipadapt.methods.prompt_learning.pre import EncodedContextLearner
from tests.golden import assert_close
from tests.images import colours
from tests.learners import bound, coop
from tests.tiny import tiny_clip

NAMES = ["red star", "cat", "blue house"]
M = 3


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone(tiny_clip())


def learner_of(
    backbone: Backbone, encoder: str = "lstm", residual: bool = True, rows: int = M
) -> EncodedContextLearner:
    torch.manual_seed(7)
    start = {"context": 0.3 * torch.randn(rows, backbone.width("text"))}
    settings = {"init": None, "n_ctx": rows, "encoder": encoder, "residual": residual}
    return bound("pre", backbone, NAMES, start, **settings)


def plain_lstm(lstm: torch.nn.LSTM, rows: Tensor) -> Tensor:
    """Both directions of the LSTM, gate by gate (M, W)."""
    halves = []
    for ending, order in (("", range(len(rows))), ("_reverse", reversed(range(len(rows))))):
        weights = [getattr(lstm, f"{kind}_l0{ending}") for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        hidden = cell = torch.zeros(rows.shape[1] // 2)
        out: dict[int, Tensor] = {}
        for m in order:
            gates = weights[0] @ rows[m] + weights[2] + weights[1] @ hidden + weights[3]
            enter, forget, new, leave = gates.chunk(4)
            cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
            hidden = out[m] = leave.sigmoid() * cell.tanh()
        halves.append(torch.stack([out[m] for m in range(len(rows))]))
    return torch.cat(halves, 1)


def plain_texts(backbone: Backbone, context: Tensor, names: list[str] = NAMES) -> Tensor:
    features = []
    for name in names:
        ids = backbone.tokenize([" ".join(["photo"] * len(context)) + f" {name}."])
        with backbone.inserted(text=[Insertion(context, at=1)]):
            features.append(backbone.encode_tokens(ids)[0])
    return torch.stack(features)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("encoder", ["lstm", "mlp", "none"])
def test_figures_of_a_plain_computation(backbone, batch, encoder, residual):
    learner = learner_of(backbone, encoder, residual)
    context = learner.context
    if encoder == "lstm":
        plain = plain_lstm(learner.encoder, context)
    elif encoder == "mlp":
        first, _, second = learner.encoder
        plain = (context @ first.weight.T + first.bias).clamp(min=0) @ second.weight.T + second.bias
    else:
        plain = context
    if residual and encoder != "none":
        plain = plain + context
    assert_close(learner.encoded(), plain.detach())
    texts = plain_texts(backbone, plain)
    logits = backbone.logit_scale * batch.features @ texts.T
    loss = cross_entropy(logits, batch.labels)
    ours, hits = learner.loss(batch)
    assert_close(learner.texts(), texts.detach())
    assert_close(ours, loss.detach())
    assert torch.equal(hits, logits.argmax(1) == batch.labels)
    parameters = list(learner.parameters())
    for a, b in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(loss, parameters), strict=True):
        assert b.abs().max() > 0, "gradients reach the context and every weight of the encoder"
        assert_close(a, b, 1e-4)
    assert not any(p.requires_grad for p in backbone.model.parameters())


def test_an_encoder_of_zeros_or_none_at_all_is_coop(backbone, batch):
    plain = coop(backbone, NAMES, learner_of(backbone).context)
    zeros, none = learner_of(backbone), learner_of(backbone, "none")
    for parameter in zeros.encoder.parameters():
        torch.nn.init.zeros_(parameter)
    for learner in (zeros, none):
        assert torch.equal(learner.texts(), plain.texts())
    assert sum(p.numel() for p in none.parameters()) == plain.context.numel()


def test_the_encoder_ties_the_vectors_together(backbone):
    learner = learner_of(backbone)
    order = [2, 0, 1]
    before = learner.encoded()[order]
    learner.context.data = learner.context.data[order]
    assert (learner.encoded() - before).abs().max() > 1e-3
    mlp = learner_of(backbone, "mlp")
    before = mlp.encoded()[order]
    mlp.context.data = mlp.context.data[order]
    assert_close(mlp.encoded(), before.detach())


def test_one_vector_has_an_encoder_too(backbone):
    learner = learner_of(backbone, rows=1)
    assert_close(learner.encoded(), (plain_lstm(learner.encoder, learner.context) + learner.context).detach())


def test_new_classes_are_put_behind_the_same_encoded_context(backbone):
    model = create("pre", init=None, n_ctx=2, epochs=2).fit(backbone, colours(2, seed=1))
    names = ["dog", "small circle"]
    other = model.with_classes(names)
    expected = plain_texts(backbone, other._bound.encoded().detach(), names)
    assert_close(other._texts, expected)
    assert torch.equal(other._bound.encoded(), model._bound.encoded())
    width = backbone.width("text")
    half = width // 2
    assert model.trained_parameters == 2 * width + 2 * (4 * half * (width + half) + 8 * half)


def test_an_odd_width_cannot_be_shared_by_two_directions(backbone):
    class Odd(EncodedContextLearner):
        def first(self) -> Tensor:
            return torch.zeros(2, 7)

    with pytest.raises(ClipadaptError, match="two directions"):
        Odd(create("pre"), backbone, NAMES)
