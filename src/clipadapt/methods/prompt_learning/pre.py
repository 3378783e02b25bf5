"""PRE: CoOp's context vectors pass through a small encoder with a residual before the text tower reads them.

    V' = V + LSTM(V)     t_c = text(start, v'_1 .. v'_M, NAME_c, ".", end)     min over V, LSTM of  CE(s x unit(t)', y)

The encoder, one bidirectional LSTM over the M vectors with W / 2 values for each direction, ties the vectors together;
it sees neither the picture nor the class, so after training V' is one fixed context, and new names are put behind it.

Pham et al., "PRE: Vision-Language Prompt Learning with Reparameterization Encoder" (arXiv 2309.07760). Of the paper
only the abstract was read; the rest is from the official repository minhanh151/PRE: the encoder with PyTorch's own
initial values, the start "a photo of a", and CoOp's SGD over 50 epochs. Its dropout of 0.05 is left out: it acts
between layers, of which there is one. Departures: V and the encoder are what is saved, as in the official checkpoints,
though V' alone would suffice; one encoder for all vectors, since those of the official option `SEPARATE` are never
trained; of the official encoders only those of one layer; no random crops (`views`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from clipadapt.backbones import Backbone
from clipadapt.errors import ClipadaptError
from clipadapt.methods.base import Card, hyper
from clipadapt.methods.prompt_learning.coop import ContextLearner
from clipadapt.methods.prompt_method import PromptLearner, PromptMethod
from clipadapt.methods.registry import register
from clipadapt.nn.prompts import first_context

BOTTLENECK = 64  # hidden units of the MLP


class EncodedContextLearner(ContextLearner):
    """A context (M, W) and the encoder that it passes through."""

    def __init__(
        self, backbone: Backbone, class_names: Sequence[str], context: Tensor, encoder: str, residual: bool
    ) -> None:
        super().__init__(backbone, class_names, context)
        width = context.shape[1]
        if encoder == "lstm" and width % 2:
            raise ClipadaptError(f"two directions of an LSTM do not share {width} values evenly; use encoder='mlp'.")
        self.encoder = {
            "lstm": lambda: nn.LSTM(width, width // 2, bidirectional=True),
            "mlp": lambda: nn.Sequential(nn.Linear(width, BOTTLENECK), nn.ReLU(), nn.Linear(BOTTLENECK, width)),
            "none": nn.Identity,
        }[encoder]()
        self.residual = residual and encoder != "none"

    def encoded(self) -> Tensor:
        """The context as the text tower reads it (M, W)."""
        out = self.encoder(self.context)
        out = out[0] if isinstance(self.encoder, nn.LSTM) else out
        return self.context + out if self.residual else out

    def texts(self) -> Tensor:
        return self.prompts.encode(self.encoded())  # (C, D)


@register
@dataclass(kw_only=True)
class PRE(PromptMethod):
    """A context that is learned through an encoder."""

    init: str | None = hyper("a photo of a", "words the context starts from, or None for random vectors (official)")
    n_ctx: int = hyper(4, "context vectors where init is None", low=1)
    encoder: str = hyper("lstm", "what the context passes through", choices=("lstm", "mlp", "none"))
    residual: bool = hyper(True, "whether the context is added to what the encoder makes of it")
    epochs: int | None = hyper(50, "passes over the support set (official); None: 50, 100 or 200 by shots", low=1)

    card = Card(
        key="pre",
        title="PRE: Vision-Language Prompt Learning with Reparameterization Encoder",
        arxiv="2309.07760",
        family="prompt-learning",
        task="few-shot classification, base-to-new",
        trains="context vectors and their encoder",
        signal="labels",
        requires=frozenset({"texts", "prompts"}),
        new_classes=True,
    )
    tiny = {"epochs": 150, "lr": 0.1}

    def _learner(self, backbone: Backbone, class_names: Sequence[str]) -> PromptLearner:
        context = first_context(backbone, self.n_ctx, self.init)
        return EncodedContextLearner(backbone, class_names, context, self.encoder, self.residual)
