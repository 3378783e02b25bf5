"""SHIP: images of classes that have none are synthesised as features, through a prompt; then any method is fitted.

    (m, v) = E(x)     z = m + exp(v / 2) e     r = G(z)     x^ = unit(t(start, p_1 + r .. p_n + r, NAME, ".", end))
    min over E, G, p of  mean( |x^ - x|^2 + KL(N(m, exp v) | N(0, 1)) )

with x the unit feature of an image, NAME its class, and e from N(0, 1).

A variational autoencoder of image features whose decoder is the frozen text tower: the latent z shifts the n learned
context vectors. With z from N(0, 1) and the name of a class without images, x^ is a feature of that class. The
wrapped method is fitted on the real and the synthesised features of all classes; it alone is kept.

Wang et al., "Improving Zero-Shot Generalization for CLIP with Synthesized Prompts" (arXiv 2307.07397). Of the paper
only the abstract was read; layers, losses and optimiser are those of the official repository mrflogs/SHIP, which
releases CoOp + SHIP (encoder 2048, generator 4096, 4 context vectors, all from N(0, 0.02); AdamW 1e-3, 50 epochs, batch
256; KL summed over the latent's entries, weight 1). Latent and shift have the widths of the feature and of the text
tower, which are the 512 and 512 of the official code for ViT-B/16.

Departures: the wrapped method gets a fixed set of synthesised features, as many for each class as the largest real
class has, where the official code draws new ones at every step, as many as real ones; the same latents serve every
class, so that classes differ by their names alone and their order does not matter; features are encoded once, without
random crops. The official code keeps the epoch that is best on the test set; here the last one counts.

The divergence is a sum over hundreds of entries against a distance below 2, so at the published weight the latent tells
almost nothing: on the embedded model, features made of one class are within 0.002 (1 - cosine) of their mean, where
those of images are within 0.27. What is made is then a prompt's text feature, and on drawn sketches (3 seeds) an
untrained synthesis helped new classes about as much; a smaller `kl` spreads the features.
"""

from typing import Any

import torch
from torch import Tensor, nn

from clipadapt.backbones import Backbone, Insertion
from clipadapt.data import Dataset
from clipadapt.data.items import FeatureItem
from clipadapt.errors import ClipadaptError
from clipadapt.features import encode_images
from clipadapt.methods import Classifier, Run, TrainingData, Wrapper, hyper, method
from clipadapt.methods.kinds.wrapper import unfitted
from clipadapt.nn.prompts import ClassPrompts, random_vectors
from clipadapt.training.loop import batches, seeded, stream, train


class Synthesis(nn.Module):
    """Encoder E, generator G and shared context vectors p; the latent has D entries, the shift W."""

    def __init__(self, dim: int, width: int, n_ctx: int, encoder_width: int, generator_width: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(dim, encoder_width), nn.ReLU())
        self.mean, self.log_var = nn.Linear(encoder_width, dim), nn.Linear(encoder_width, dim)
        self.shift = nn.Sequential(nn.Linear(dim, generator_width), nn.ReLU(), nn.Linear(generator_width, width))
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.context = nn.Parameter(random_vectors(n_ctx, width))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Unit features (B, D) -> the latent's mean and log variance, both (B, D)."""
        hidden = self.hidden(images)
        return self.mean(hidden), self.log_var(hidden)

    def contexts(self, latents: Tensor) -> Tensor:
        """(B, D) -> (B, n, W): one shift for all vectors of a context."""
        return self.context + self.shift(latents)[:, None]


def synthesis_loss(made: Tensor, images: Tensor, mean: Tensor, log_var: Tensor, kl: float = 1.0) -> Tensor:
    """Squared distance of unit features (B, D) plus `kl` times the divergence from N(0, 1), summed over entries."""
    distance = (made - images).square().sum(1)
    divergence = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(1)
    return (distance + kl * divergence).mean()


@torch.no_grad()
def sample(backbone: Backbone, synthesis: Synthesis, class_names: list[str], latents: Tensor) -> Tensor:
    """Unit features of each class (K, n, D), on the CPU, from latents (n, D)."""
    prompts = ClassPrompts(backbone, class_names, len(synthesis.context))
    return prompts.encode(synthesis.contexts(latents)[:, None]).transpose(0, 1).cpu()


@method(
    "ship",
    title="Improving Zero-Shot Generalization for CLIP with Synthesized Prompts",
    arxiv="2307.07397",
    trains="a feature generator, and what the wrapped method trains",
    requires={"texts", "prompts"},
    new_classes=True,
)
class Ship(Wrapper, Classifier):
    """Any method that learns from features, with synthesised features for the classes that have no images.

    These are `new_classes` and every class of the support set without an image; where there is none, the wrapped
    method is fitted as it is. What is learned and saved is that of the wrapped method.

    >>> method = create("ship", method="tip-adapter", new_classes=["dog"], epochs=1, encoder_width=16)
    >>> model = method.fit(backbone, support)
    >>> model.class_names_
    ['red', 'green', 'blue', 'yellow', 'dog']
    """

    method: Any = hyper("coop", "the method to fit: a key or an unfitted method, of features or of text prompts")
    new_classes: list[str] = hyper([], "names of further classes without images")
    per_class: int | None = hyper(None, "features made for each such class; by default as of the largest class", low=1)
    n_ctx: int = hyper(4, "context vectors of the synthesis (official)", low=1)
    encoder_width: int = hyper(2048, "hidden width of the encoder (official; 4096 for ImageNet)", low=1)
    generator_width: int = hyper(4096, "hidden width of the generator (official)", low=1)
    kl: float = hyper(1.0, "weight of the divergence (official)", low=0)
    lr: float = hyper(1e-3, "AdamW learning rate of the synthesis (official)", low=0)
    epochs: int = hyper(50, "passes of the synthesis over the support set (official; 10 for ImageNet)", low=1)
    batch_size: int = hyper(256, "images a step of the synthesis (official)", low=1)
    seed: int = hyper(1, "initial values, latents and order of the images in the synthesis")

    def _learn(self, model: Backbone, data: TrainingData, run: Run) -> None:
        inner = unfitted(self)
        if not (inner.kind == "features" or (inner.kind == "prompts" and not inner.learner.on_pixels)):
            raise ClipadaptError(f"ship synthesises features, and {inner.card.key} learns from images.")
        inner.fit(model, completed(self, model, data.support, run), val=data.val, report=run.report, resume=run.folder)
        self.inner_, self.class_names_ = [inner], inner.class_names_
        run.trained = inner.trained_parameters

    def _reclassify(self, model: Any) -> None:
        self.inner_ = [self.inner_[0].with_classes(self.class_names_)]  # nothing is synthesised for them

    def _logits(self, images: Tensor) -> Tensor:
        return self.inner_[0]._logits(images)  # (N, C)


def completed(of: Ship, backbone: Backbone, support: Dataset, run: Run) -> Dataset:
    """The support set with features of the classes without images; itself where there are none."""
    names = [*support.class_names, *(n for n in dict.fromkeys(of.new_classes) if n not in support.class_names)]
    empty = sorted(set(range(len(names))) - set(support.labels), key=lambda c: names[c])
    if not empty:
        return support
    images = encode_images(backbone, support).features
    synthesis = trained(of, backbone, support, images, run)
    count = of.per_class or max(support.counts)
    latents = torch.randn(count, backbone.dim, generator=stream(of.seed, 0)).to(backbone.device)
    made = sample(backbone, synthesis, [names[c] for c in empty], latents)  # (K, count, D)
    items = [FeatureItem(f"feature {i}", x) for i, x in enumerate(torch.cat([images, made.flatten(0, 1)]))]
    more = torch.tensor(empty).repeat_interleave(made.shape[1]).tolist()
    return Dataset([*items], [*support.labels, *more], names, name="real and synthesised features")


def trained(of: Ship, backbone: Backbone, support: Dataset, images: Tensor, run: Run) -> Synthesis:
    """A synthesis that makes the features (N, D) of the support set's images."""
    labels, device = torch.tensor(support.labels), backbone.device
    with seeded(of.seed):
        synthesis = Synthesis(backbone.dim, backbone.width("text"), of.n_ctx, of.encoder_width, of.generator_width).to(
            device
        )
    prompts = ClassPrompts(backbone, support.class_names, of.n_ctx)

    def loss_of(step: tuple[int, Tensor]) -> Tensor:
        x, y = images[step[1]].to(device), labels[step[1]].to(device)
        mean, log_var = synthesis(x)
        noise = torch.randn(mean.shape, generator=stream(of.seed, step[0])).to(device)
        contexts = synthesis.contexts(mean + (0.5 * log_var).exp() * noise)  # (B, n, W)
        # every image has a context of its own, so only its own class is encoded: B prompts, not B x C
        encoder = backbone.prompt_encoder(prompts.ids[y])
        made = encoder([Insertion(contexts, at=prompts.rows[y])])  # (B, D)
        return synthesis_loss(made, x, mean, log_var, of.kl)

    steps = list(enumerate(batches(len(images), of.batch_size, epochs=of.epochs, seed=of.seed), start=1))
    train(loss_of, torch.optim.AdamW(synthesis.parameters(), lr=of.lr), steps, run=run)
    return synthesis
