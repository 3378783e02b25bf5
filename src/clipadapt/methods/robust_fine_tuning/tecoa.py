"""TeCoA: fine-tuning on attacked pictures towards frozen class texts, so that classes never seen are robust as well.

    min over theta of  CE(s f(x_adv; theta) T', y)        x_adv = argmax of the same loss over |x_adv - x|_inf <= eps

Attacks are in plain pixel values [0, 1], before normalisation (`training.attacks.pgd`). Tuned is the image tower
("finetune") or a visual prompt ("prompt"): a frame that is added to the normalised picture, and tokens beside its
patches; the attack sees the prompt. A frame is exactly a change of the position embeddings of the patches it covers,
since patch embedding is linear: it is merged into the weights. Tokens are not, so a model with tokens has no export.

Mao et al., "Understanding Zero-Shot Adversarial Robustness for Large-Scale Models" (arXiv 2212.07016); of the paper
only the abstract could be read. Details are those of the official repository cvlab-columbia/ZSRobust4FoundationModel,
and of the two commands in its README where they differ from its code's defaults: eps 1/255 and 2 steps of 1/255 from a
random start (defaults: 2/255, 5 steps), batches of 256, 10 epochs, no augmentation, no weight decay, warm-up and
cosine; for a prompt a frame of 30 of 224 pixels, 10 tokens (README: 100) and SGD with momentum 0.9 at 40.
`head="one-hot"` is the baseline that the paper compares with: adversarial training that knows no texts, here towards
random directions of the classes that are thrown away afterwards.

Departures: the tower learns by AdamW at 1e-5, as in `fine-tune`, since runs on few pictures are far too short for SGD
at the official 1e-7; a prompt starts near zero, where clean accuracy still is CLIP's (official: N(0, 1), `start=1`);
batches of at most 64; "a photo of a NAME." for "This is a photo of a NAME"; the warm-up is a tenth of the run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import cross_entropy, normalize

from clipadapt.backbones import Backbone, Insertion
from clipadapt.backbones.families import submodule
from clipadapt.data import Dataset
from clipadapt.errors import ClipadaptError
from clipadapt.features import encode_images
from clipadapt.methods.base import Card, Run, hyper, with_weights
from clipadapt.methods.registry import register
from clipadapt.methods.tower_method import PixelBatch, TowerMethod, detached, tower_parameters
from clipadapt.nn.prompts import random_vectors, visual_prompts
from clipadapt.training.attacks import LEVEL, PixelSpace, pgd
from clipadapt.training.loop import Loss, seeded


def border(size: tuple[int, int], share: float) -> Tensor:
    """(H, W) bool: the pixels of a frame as wide as `share` of the shorter side, and at least one pixel."""
    width = max(1, round(share * min(size)))
    mask = torch.ones(size, dtype=torch.bool)
    mask[width:-width, width:-width] = False
    return mask


def framed_positions(backbone: Backbone, frame: Tensor) -> dict[str, Tensor]:
    """The position embeddings with which a picture is embedded as if `frame` (3, H, W) were added to its pixels."""
    embeddings = backbone.tower("vision").embeddings
    rows: list[Tensor] = []
    with torch.no_grad(), submodule(backbone.model, embeddings).register_forward_hook(lambda *io: rows.append(io[2])):
        for picture in (frame, torch.zeros_like(frame)):
            backbone.encode_images(picture[None])
    name = f"{embeddings}.position_embedding.weight"
    positions = backbone.model.state_dict()[name]  # (R, W)
    return {name: (positions + (rows[0] - rows[1])[0]).cpu()}


def one_hot_head(backbone: Backbone, class_names: list[str], seed: int) -> Tensor:
    """Random unit directions of the classes (C, D), times the logit scale; a name's does not depend on its label."""
    drawn = torch.randn(len(class_names), backbone.dim, generator=torch.Generator().manual_seed(seed))
    rank = torch.tensor(sorted(range(len(class_names)), key=lambda c: class_names[c])).argsort()
    return backbone.logit_scale * normalize(drawn[rank], dim=1).to(backbone.device)


@register
@dataclass(kw_only=True)
class TeCoA(TowerMethod):
    """Text-guided adversarial training of the image tower or of a visual prompt."""

    tune: str = hyper("finetune", "what learns: the image tower, or a visual prompt", choices=("finetune", "prompt"))
    head: str = hyper(
        "text",
        "what pictures learn towards: class texts, or (the paper's baseline) no texts",
        choices=("text", "one-hot"),
    )
    eps: float = hyper(1.0, "radius of the attack, in levels of 1/255; 0 is no attack (official)", low=0, high=255)
    attack_steps: int = hyper(2, "steps of the attack (official)", low=1)
    step_size: float = hyper(1.0, "of the attack, in levels of 1/255 (official)", low=0)
    frame: float = hyper(30 / 224, "prompt: width of the frame, share of the side (official)", low=0, high=0.5)
    tokens: int = hyper(10, "prompt: tokens beside the patches (official)", low=0)
    lr: float = hyper(1e-5, "finetune: AdamW learning rate (as in fine-tune)", low=0)
    start: float = hyper(0.02, "prompt: standard deviation of its start values (official: 1)", low=0)
    prompt_lr: float = hyper(40.0, "prompt: SGD learning rate, momentum 0.9 (official)", low=0)
    epochs: int = hyper(10, "passes over the support set (official)", low=1)
    min_scale: float = hyper(1.0, "least area of the random crops, in (0, 1]; 1 is no augmentation", low=0.01, high=1)

    card = Card(
        key="tecoa",
        title="Understanding Zero-Shot Adversarial Robustness for Large-Scale Models",
        arxiv="2212.07016",
        family="robust-fine-tuning",
        task="zero-shot adversarial robustness",
        trains="image tower or visual prompt",
        signal="labels",
        requires=frozenset({"texts", "weights", "gradients", "prompts"}),
        new_classes=True,
    )
    tiny = {"lr": 3e-4, "epochs": 5, "batch_size": 16}
    weight_decay = 0.0
    clip_norm = None

    def _fit_towers(self, backbone: Backbone, support: Dataset, val: Dataset | None, run: Run) -> None:
        adapted, space = backbone.copy(), PixelSpace.of(backbone)
        self.weight_ = self._text_classifier(backbone)  # (C, D)
        head = self.weight_.to(backbone.device)
        learned: dict[str, Parameter] = {}
        if self.head == "one-hot":
            head = learned["head"] = Parameter(one_hot_head(backbone, support.class_names, self.seed))
        if self.tune == "finetune":
            tower = tower_parameters(adapted, "vision")
            encode: Callable[[Tensor], Tensor] = adapted.encode_images
            learned |= tower
        else:
            mask = border(backbone.image_size, self.frame).to(backbone.device)  # (H, W)
            shapes = (3, int(mask.sum())), (self.tokens, backbone.width("vision"))
            with seeded(self.seed):
                edge, vectors = (Parameter(random_vectors(*s, std=self.start).to(backbone.device)) for s in shapes)
            learned |= {"edge": edge, "tokens": vectors} if self.tokens else {"edge": edge}

            def frame() -> Tensor:
                return torch.zeros(3, *mask.shape, device=edge.device).masked_scatter(mask, edge)  # (3, H, W)

            def encode(pixels: Tensor) -> Tensor:
                with backbone.inserted(vision=beside(vectors)):
                    return backbone.encode_images(pixels + frame())

        def scores(plain: Tensor) -> Tensor:
            return encode(space.pixels(plain)) @ head.T  # (B, C)

        def loss_of(batch: PixelBatch) -> Loss:
            attacked = pgd(
                scores,
                space.plain(batch.pixels),
                batch.labels,
                eps=self.eps * LEVEL,
                step_size=self.step_size * LEVEL,
                steps=self.attack_steps,
                generator=torch.Generator().manual_seed(self.seed * 1_000_003 + batch.number),
            )
            logits = scores(attacked)
            return cross_entropy(logits, batch.labels), logits.argmax(1) == batch.labels

        parameters = list(learned.values())
        if self.tune == "finetune":
            self._train(backbone, support, parameters, loss_of, run)
        else:
            optimizer = torch.optim.SGD(parameters, lr=self.prompt_lr, momentum=0.9)
            self._train(backbone, support, parameters, loss_of, run, optimizer=optimizer)
        self.trained_ = sum(parameter.numel() for parameter in parameters)
        if self.tune == "finetune":
            self.tower_ = detached(tower)
        else:
            self.tower_ = framed_positions(backbone, frame().detach())
            self.tokens_ = vectors.detach().cpu()
        self._restore(backbone)

    def _restore(self, backbone: Backbone | None) -> None:
        assert backbone is not None  # a weight method is never fitted on features alone
        self.backbone_ = with_weights(backbone, self.tower_)

    def _inserted(self) -> Any:
        """The context in which the fitted tower sees its learned tokens, if there are any."""
        backbone = self._fitted("backbone_")
        vectors = getattr(self, "tokens_", torch.empty(0))
        return backbone.inserted(vision=beside(vectors.to(backbone.device)))

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        with self._inserted():
            return super().encode_pixels(pixels)

    def _beside_image_tower(self) -> dict[str, Tensor]:
        return {"tokens_": self.tokens_} if len(getattr(self, "tokens_", ())) else {}

    def image_logits(self, images: Any, *, on_error: str = "raise", progress: bool = False) -> tuple[Tensor, list[int]]:
        """See `Method.image_logits`."""
        with self._inserted():  # which the fingerprint, and so the cache, does not know
            encoded = encode_images(
                self._fitted("backbone_"), images, cache=False, on_error=on_error, progress=progress
            )
        return self._logits(encoded.features), encoded.kept

    def export(self, folder: str | Path) -> None:
        """Write the adapted towers as a plain transformers folder; refused where tokens were learned."""
        if len(getattr(self, "tokens_", ())):
            raise ClipadaptError(
                "tecoa: learned tokens are no weights of a tower, so there is no export; set tokens=0."
            )
        super().export(folder)

    @property
    def trained_parameters(self) -> int:
        return self.trained_


def beside(vectors: Tensor) -> list[Insertion]:
    """Tokens (n, W) behind the patches; none for n = 0."""
    return visual_prompts(vectors) if len(vectors) else []
