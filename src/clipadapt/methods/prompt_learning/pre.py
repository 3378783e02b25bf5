"""PRE: CoOp's context vectors pass through a small encoder with a residual before the text tower reads them.

    V' = V + LSTM(V)     t_c = text(start, v'_1 .. v'_M, NAME_c, ".", end)     min over V, LSTM of  CE(s x unit(t)', y)

The encoder, one bidirectional LSTM over the M vectors with W / 2 values for each direction, ties the vectors together;
it sees neither the image nor the class, so after training V' is one fixed context, and new names are put behind it.

Pham et al., "PRE: Vision-Language Prompt Learning with Reparameterization Encoder" (arXiv 2309.07760). Of the paper
only the abstract was read; the rest is from the official repository minhanh151/PRE: the encoder with PyTorch's own
initial values, the start "a photo of a", and CoOp's SGD over 50 epochs. Its dropout of 0.05 is left out: it acts
between layers, of which there is one. Departures: V and the encoder are what is saved, as in the official checkpoints,
though V' alone would suffice; one encoder for all vectors, since those of the official option `SEPARATE` are never
trained; of the official encoders only those of one layer; no random crops (`views`).
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from clipadapt.backbones import Backbone
from clipadapt.errors import ClipadaptError
from clipadapt.methods import Classifier, PromptMethod, hyper, method
from clipadapt.methods.kinds.contexts import ContextLearner

BOTTLENECK = 64  # hidden units of the MLP


class EncodedContextLearner(ContextLearner):
    """A context (M, W) and the encoder that it passes through."""

    def __init__(self, of: Any, backbone: Backbone, class_names: Sequence[str]) -> None:
        super().__init__(of, backbone, class_names)
        width = self.context.shape[1]
        if of.network == "lstm" and width % 2:
            raise ClipadaptError(f"two directions of an LSTM do not share {width} values evenly; use encoder='mlp'.")
        self.encoder = {
            "lstm": lambda: nn.LSTM(width, width // 2, bidirectional=True),
            "mlp": lambda: nn.Sequential(nn.Linear(width, BOTTLENECK), nn.ReLU(), nn.Linear(BOTTLENECK, width)),
            "none": nn.Identity,
        }[of.network]()
        self.residual = of.residual and of.network != "none"

    def encoded(self) -> Tensor:
        """The context as the text tower reads it (M, W)."""
        out = self.encoder(self.context)
        out = out[0] if isinstance(self.encoder, nn.LSTM) else out
        return self.context + out if self.residual else out

    def texts(self) -> Tensor:
        return self.prompts.encode(self.encoded())  # (C, D)


@method(
    "pre",
    title="PRE: Vision-Language Prompt Learning with Reparameterization Encoder",
    arxiv="2309.07760",
    problem="few-shot classification, base-to-new",
    trains="context vectors and their encoder",
    new_classes=True,
)
class PRE(PromptMethod, Classifier):
    """A context that is learned through an encoder.

    >>> model = create("pre", epochs=1).fit(backbone, support)
    >>> model.predict_proba(queries).shape
    (8, 4)
    """

    init: str | None = hyper("a photo of a", "words the context starts from, or None for random vectors (official)")
    n_ctx: int = hyper(4, "context vectors where init is None", low=1)
    network: str = hyper("lstm", "what the context passes through", choices=("lstm", "mlp", "none"), name="encoder")
    residual: bool = hyper(True, "whether the context is added to what the encoder makes of it")
    epochs: int | None = hyper(50, "passes over the support set (official); None: 50, 100 or 200 by shots", low=1)

    learner = EncodedContextLearner
