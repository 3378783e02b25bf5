"""TeCoA: fine-tuning on attacked images towards frozen class texts, so that classes never seen are robust as well.

    min over theta of  CE(s f(x_adv; theta) T', y)        x_adv = argmax of the same loss over |x_adv - x|_inf <= eps

Attacks are in plain pixel values [0, 1], before normalisation (`training.attacks.pgd`). Tuned is the image tower
("finetune") or a visual prompt ("prompt"): a frame that is added to the normalised image, and tokens next to its
patches; the attack sees the prompt. A frame is exactly a change of the position embeddings of the patches it covers,
since patch embedding is linear: it is merged into the weights. Tokens are not, so a model with tokens has no export.

Mao et al., "Understanding Zero-Shot Adversarial Robustness for Large-Scale Models" (arXiv 2212.07016); of the paper
only the abstract could be read. Details are those of the official repository cvlab-columbia/ZSRobust4FoundationModel,
and of the two commands in its README where they differ from its code's defaults: eps 1/255 and 2 steps of 1/255 from a
random start (defaults: 2/255, 5 steps), batches of 256, 10 epochs, no augmentation, no weight decay, warm-up and
cosine; for a prompt a frame of 30 of 224 pixels, 10 tokens (README: 100) and SGD with momentum 0.9 at 40.
`head="one-hot"` is the baseline that the paper compares with: adversarial training that knows no texts, here towards
random directions of the classes that are thrown away afterwards.

Departures: the tower learns by AdamW at 1e-5, as in `fine-tune`, since runs on few images are far too short for SGD
at the official 1e-7; a prompt starts near zero, where clean accuracy still is CLIP's (official: N(0, 1), `start=1`);
batches of at most 64; "a photo of a NAME." for "This is a photo of a NAME"; the warm-up is a tenth of the run.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import cross_entropy, normalize

from clipadapt.backbones import Backbone, Insertion
from clipadapt.backbones.families import submodule
from clipadapt.data import Dataset
from clipadapt.methods import Classifier, FineTuningMethod, TrainingData, hyper, method
from clipadapt.methods.kinds.weights import ChangedImages, Outputs, References, tower_weights
from clipadapt.nn.prompts import random_vectors, visual_prompts
from clipadapt.nn.updates import Full, Update
from clipadapt.training.attacks import LEVEL, PixelSpace, pgd
from clipadapt.training.loop import stream


def border(size: tuple[int, int], share: float) -> Tensor:
    """(H, W) bool: the pixels of a frame as wide as `share` of the shorter side, and at least one pixel."""
    width = max(1, round(share * min(size)))
    mask = torch.ones(size, dtype=torch.bool)
    mask[width:-width, width:-width] = False
    return mask


def framed_positions(backbone: Backbone, frame: Tensor) -> dict[str, Tensor]:
    """The position embeddings with which an image is embedded as if `frame` (3, H, W) were added to its pixels."""
    embeddings = backbone.tower("vision").embeddings
    rows: list[Tensor] = []
    with torch.no_grad(), submodule(backbone.model, embeddings).register_forward_hook(lambda *io: rows.append(io[2])):
        for image in (frame, torch.zeros_like(frame)):
            backbone.encode_images(image[None])
    name = f"{embeddings}.position_embedding.weight"
    positions = backbone.model.state_dict()[name]  # (R, W)
    return {name: (positions + (rows[0] - rows[1])[0]).cpu()}


def one_hot_head(backbone: Backbone, class_names: list[str], seed: int) -> Tensor:
    """Random unit directions of the classes (C, D), times the logit scale; a name's does not depend on its label."""
    drawn = torch.randn(len(class_names), backbone.dim, generator=torch.Generator().manual_seed(seed))
    rank = torch.tensor(sorted(range(len(class_names)), key=lambda c: class_names[c])).argsort()
    return backbone.logit_scale * normalize(drawn[rank], dim=1).to(backbone.device)


def token_prompts(vectors: Tensor) -> list[Insertion]:
    """Tokens (n, W) behind the patches; none for n = 0."""
    return visual_prompts(vectors) if len(vectors) else []


class VisualPrompt(Update):
    """A frame that is added to the normalised image, and tokens next to its patches."""

    def __init__(self, backbone: Backbone, share: float, tokens: int, std: float) -> None:
        super().__init__()
        self.backbone, self.mask = backbone, border(backbone.image_size, share).to(backbone.device)  # (H, W)
        shapes = (3, int(self.mask.sum())), (tokens, backbone.width("vision"))
        self.edge, self.tokens = (Parameter(random_vectors(*s, std=std).to(backbone.device)) for s in shapes)

    def frame(self) -> Tensor:
        """(3, H, W)"""
        return torch.zeros(3, *self.mask.shape, device=self.edge.device).masked_scatter(self.mask, self.edge)

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D)"""
        with self.backbone.inserted(vision=token_prompts(self.tokens)):
            return self.backbone.encode_images(pixels + self.frame())

    def parameters(self, recurse: bool = True) -> Any:
        return iter([self.edge, self.tokens] if len(self.tokens) else [self.edge])

    def _computing(self, model: Any) -> Any:
        return nullcontext()

    def tensors(self) -> dict[str, Tensor]:
        """The frame as position embeddings, and the tokens."""
        kept = framed_positions(self.backbone, self.frame().detach())
        return kept | ({"tokens": self.tokens.detach().cpu()} if len(self.tokens) else {})


@method(
    "tecoa",
    title="Understanding Zero-Shot Adversarial Robustness for Large-Scale Models",
    arxiv="2212.07016",
    problem="zero-shot adversarial robustness",
    trains="image tower or visual prompt",
    requires={"texts", "weights", "gradients", "prompts"},
    new_classes=True,
)
class TeCoA(FineTuningMethod, Classifier):
    """Text-guided adversarial training of the image tower or of a visual prompt.

    >>> model = create("tecoa", epochs=1, attack_steps=1).fit(backbone, support)
    >>> model.predict_proba(queries).shape
    (8, 4)
    """

    tune: str = hyper("finetune", "what learns: the image tower, or a visual prompt", choices=("finetune", "prompt"))
    target: str = hyper(
        "text",
        "what images learn towards: class texts, or (the paper's baseline) no texts",
        choices=("text", "one-hot"),
        name="head",
    )
    eps: float = hyper(1.0, "radius of the attack, in levels of 1/255; 0 is no attack (official)", low=0, high=255)
    attack_steps: int = hyper(2, "steps of the attack (official)", low=1)
    step_size: float = hyper(1.0, "of the attack, in levels of 1/255 (official)", low=0)
    frame: float = hyper(30 / 224, "prompt: width of the frame, share of the side (official)", low=0, high=0.5)
    tokens: int = hyper(10, "prompt: tokens next to the patches (official)", low=0)
    lr: float = hyper(1e-5, "finetune: AdamW learning rate (as in fine-tune)", low=0)
    start: float = hyper(0.02, "prompt: standard deviation of its start values (official: 1)", low=0)
    prompt_lr: float = hyper(40.0, "prompt: SGD learning rate, momentum 0.9 (official)", low=0)
    epochs: int = hyper(10, "passes over the support set (official)", low=1)
    min_scale: float = hyper(1.0, "least area of the random crops, in (0, 1]; 1 is no augmentation", low=0.01, high=1)

    weight_decay, clip_norm = 0.0, None

    def _update(self, towers: Backbone, data: TrainingData) -> Update:
        self._space = PixelSpace.of(towers)
        self._encode: Any = towers.encode_images
        if self.tune == "finetune":
            return Full(towers.model, tower_weights(towers, "vision"))
        prompt = VisualPrompt(towers, self.frame, self.tokens, self.start)
        self._encode = prompt.encode
        return prompt

    def _saved(self, model: Backbone) -> Full:
        return Full.restore({name: t for name, t in self.update_.items() if name != "tokens"}, model.model)

    def _references(self, towers: Backbone, model: Backbone, support: Dataset) -> References:
        head, learned = self._text_classifier(model).to(model.device), None  # (C, D)
        if self.target == "one-hot":
            head = learned = Parameter(one_hot_head(model, self.class_names_, self.seed))
        self._head = head
        return (lambda labels, number: {}), learned

    def _outputs(self, towers: Backbone, out: Outputs) -> Outputs:
        def scores(plain: Tensor) -> Tensor:
            return self._encode(self._space.pixels(plain)) @ self._head.T  # (B, C)

        attacked = pgd(
            scores,
            self._space.plain(out["pixels"]),
            out["labels"],
            eps=self.eps * LEVEL,
            step_size=self.step_size * LEVEL,
            steps=self.attack_steps,
            generator=stream(self.seed, out["number"]),
        )
        return out | {"logits": scores(attacked)}

    def _objective(self, out: Outputs) -> Tensor:
        return cross_entropy(out["logits"], out["labels"])

    def _optimizer(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        if self.tune == "finetune":
            return super()._optimizer(parameters)
        return torch.optim.SGD(parameters, lr=self.prompt_lr, momentum=0.9)

    def _changed_images(self, model: Backbone) -> ChangedImages | None:
        tokens = self.update_.get("tokens")
        if tokens is None:
            return None

        def encode(pixels: Tensor) -> Tensor:
            with model.inserted(vision=token_prompts(tokens.to(model.device))):
                return model.encode_images(pixels)

        return encode, {"tokens_": tokens}
