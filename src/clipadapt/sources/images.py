"""Images of classes that are known by name only: given, drawn, retrieved from a pool, or generated.

The two ways of SuS-X (arXiv 2211.16198), as the official repository vishaal27/SuS-X has them: `Retrieved` is SuS-LC
over the user's own pool in place of LAION-5B, `Generated` is SuS-SD with any text-to-image pipeline of `diffusers`.

    source = Retrieved("unsorted/")                      # or Generated("CompVis/stable-diffusion-v1-4")
    support = support_of(source, backbone, ["cat", "dog"], per_class=16, seed=1)
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from PIL import Image

from clipadapt.backbones import Backbone
from clipadapt.data import Dataset, FileItem, ImageItem, Item, as_items, class_texts, image_files, image_folder
from clipadapt.data.playground import KINDS, Playground
from clipadapt.errors import ClipadaptError, DataError
from clipadapt.features.classes import encode_classes
from clipadapt.features.encode import encode_images
from clipadapt.files import written_aside

OTHER_WORLD = 1_000_000  # added to a seed, so that the playground never draws the images of a data set made of it

Prompts = Mapping[str, Sequence[str]]


class ImageSource(Protocol):
    """Anything that finds or makes images of classes that are known by name."""

    def __call__(
        self, class_names: Sequence[str], per_class: int, seed: int, prompts: Prompts | None = None
    ) -> Dataset:
        """Images of `class_names`, about `per_class` of each; there may be others, under further class names.

        The same arguments give the same images. `prompts`, {class name: sentences}, take the place of the source's
        own sentences, if it has such; where an image is made from one sentence, that is the image's name.
        """


def as_image_source(value: Any, backbone: Backbone) -> ImageSource:
    """The source given by `value`.

    Args:
        value: a `Dataset`; the path of a folder with one sub-folder per class; "playground", images drawn by
            `clipadapt.data.playground.drawing`; or an `ImageSource`, which stays as it is.
        backbone: what a `Retrieved` that names no backbone looks with, and whose image size is drawn.

    Raises:
        DataError: the folder does not exist, or is not divided into classes.
        ClipadaptError: it is something else.
    """
    if isinstance(value, Dataset):
        return Given(value)
    if isinstance(value, str | os.PathLike):
        return Drawn(max(32, *backbone.image_size)) if value == Drawn.name else Given(image_folder(value))
    if isinstance(value, Retrieved) and value.backbone is None:
        return replace(value, backbone=backbone)
    if callable(value) and not isinstance(value, type):
        return value
    raise ClipadaptError(
        'An image source is a Dataset, a folder of classes, "playground", or a callable (class_names, per_class, seed, '
        f"prompts) -> Dataset, not {value!r}."
    )


def support_of(
    source: Any,
    backbone: Backbone,
    class_names: Sequence[str],
    per_class: int,
    seed: int,
    prompts: Prompts | None = None,
) -> Dataset:
    """The images that `source` (what `as_image_source` takes) has of `class_names`, labelled in their order.

    Raises:
        ClipadaptError: it has no image of one of them, or does not answer with a data set.
    """
    data = as_image_source(source, backbone)(class_names, per_class, seed, prompts)
    if not isinstance(data, Dataset):
        raise ClipadaptError(f"An image source must return a Dataset, not {type(data).__name__}.")
    shown = {name for name, count in zip(data.class_names, data.counts, strict=True) if count}
    missing = [name for name in class_names if name not in shown]
    if missing:
        raise ClipadaptError(
            f"The source {data.name} has no image of {', '.join(map(repr, missing))}; it has images of "
            f"{', '.join(map(repr, sorted(shown))) or 'nothing'}."
        )
    return data.only(class_names)


@dataclass(frozen=True)
class Given:
    """Labelled images that are there already: all of them, however many."""

    data: Dataset

    @property
    def name(self) -> str:
        """That of the data set."""
        return self.data.name

    def __call__(
        self, class_names: Sequence[str], per_class: int, seed: int, prompts: Prompts | None = None
    ) -> Dataset:
        return self.data


@dataclass(frozen=True)
class Drawn:
    """Images that `clipadapt.data.playground.drawing` draws, `size` pixels wide: of few kinds of things.

    Raises:
        ClipadaptError: when called, if a class is not among these.
    """

    name: ClassVar[str] = "playground"

    size: int

    def __call__(
        self, class_names: Sequence[str], per_class: int, seed: int, prompts: Prompts | None = None
    ) -> Dataset:
        unknown = [name for name in class_names if name not in KINDS]
        if unknown:
            raise ClipadaptError(
                f"Of these classes the playground cannot draw {', '.join(map(repr, unknown))}; it draws "
                f"{', '.join(KINDS)}. Give a data set or a folder of images."
            )
        return Playground(size=self.size, kinds=tuple(sorted(class_names)), seed=OTHER_WORLD + seed).dataset(per_class)


@dataclass(frozen=True)
class Retrieved:
    """Of a pool of images, for each class those most similar to its text feature.

    An image may serve several classes. Nothing is random.

    Args:
        pool: what `clipadapt.data.as_items` takes, or a folder; labels are not looked at, of copies one is used.
        templates: of the sentences whose mean feature a class is sought by (see `clipadapt.data.class_texts`).
        name: what it is called in messages.
        backbone: what looks; without it, the one that a method is fitted on.

    Raises:
        DataError: when called, if the pool holds fewer images than are asked for.
    """

    pool: Any = field(repr=False)
    templates: Any = "photo"
    name: str = "retrieved"
    backbone: Backbone | None = field(default=None, repr=False)

    def __call__(
        self, class_names: Sequence[str], per_class: int, seed: int, prompts: Prompts | None = None
    ) -> Dataset:
        if self.backbone is None:
            raise ClipadaptError("Retrieved compares features and needs backbone=.")
        pool = self.pool
        if isinstance(pool, str | os.PathLike) and os.path.isdir(pool):
            pool = image_files(pool)
        items = list({item.digest(): item for item in reversed(as_items(pool))}.values())[::-1]
        if len(items) < per_class:
            raise DataError(
                f"The pool {self.name!r} holds {len(items)} different images; {per_class} per class are "
                "needed: give a larger pool or a smaller per_class."
            )
        texts = encode_classes(self.backbone, class_names, self.templates if prompts is None else prompts)  # (C, D)
        similarity = texts @ encode_images(self.backbone, items).features.T  # (C, P)
        nearest = similarity.sort(dim=1, descending=True, stable=True).indices[:, :per_class]  # (C, per_class)
        chosen = [items[row] for row in nearest.flatten().tolist()]
        labels = [label for label in range(len(class_names)) for _ in range(per_class)]
        return Dataset(chosen, labels, list(class_names), name=self.name)


@dataclass
class Generated:
    """Images that a text-to-image pipeline of `diffusers` makes of sentences, kept for as long as this object lives.

    Each image has its own `torch.Generator` on the CPU, seeded by `seed`, class, sentence and its number, so that it
    depends neither on the batch nor on the order of classes. What the pipeline's safety checker blackens is left out.

    Args:
        pipeline: a diffusers pipeline, or the folder or hub id of one (needs the extra [diffusers]).
        templates: of the sentences (see `clipadapt.data.class_texts`); a class's are taken in turn.
        settings: what the pipeline is called with in addition to prompts and generators (defaults: SuS-SD's).
        folder: where to keep the images, as PNG files in a sub-folder per class; what is there is not made again.
        batch_size: images per call of the pipeline (SuS-SD: 5).
        device: where a pipeline that is loaded goes; one that is given stays where it is.

    Raises:
        ClipadaptError: the pipeline or the batch size is not one; when called, if the pipeline cannot be loaded or
            does not answer as one of diffusers.
    """

    pipeline: Any
    templates: Any = "photo"
    settings: Mapping[str, Any] = field(default_factory=lambda: {"guidance_scale": 9.5, "num_inference_steps": 85})
    folder: str | os.PathLike[str] | None = None
    batch_size: int = 5
    device: str | torch.device = "cpu"
    _made: dict[str, Image.Image] = field(default_factory=dict, init=False, repr=False)
    _pipeline: Any = field(default=None, init=False, repr=False)  # what was loaded
    _blackened: set[str] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        if not (callable(self.pipeline) or isinstance(self.pipeline, str | os.PathLike)):
            raise ClipadaptError(
                f"The pipeline must be a diffusers pipeline, or the folder or hub id of one, not {self.pipeline!r}."
            )
        if self.batch_size < 1:
            raise ClipadaptError(f"batch_size must be at least 1, not {self.batch_size}.")

    @property
    def name(self) -> str:
        """That of the pipeline."""
        if callable(self.pipeline):
            return getattr(self.pipeline, "name_or_path", None) or type(self.pipeline).__name__
        return os.fspath(self.pipeline)

    def __call__(
        self, class_names: Sequence[str], per_class: int, seed: int, prompts: Prompts | None = None
    ) -> Dataset:
        wanted: list[_Wanted] = []
        sentences = class_texts(class_names, self.templates if prompts is None else prompts)
        for label, (name, own) in enumerate(zip(class_names, sentences, strict=True)):
            for number in range(per_class):
                prompt = own[number % len(own)]
                facts = json.dumps([self.name, dict(self.settings), name, prompt, seed, number], default=str)
                wanted.append(_Wanted(label, name, prompt, blake2b(facts.encode(), digest_size=16).hexdigest()))
        missing = [one for one in wanted if one.key not in self._blackened and self._find(one) is None]
        for start in range(0, len(missing), self.batch_size):
            self._make(missing[start : start + self.batch_size])
        kept = [(item, one.label) for one in wanted if (item := self._find(one)) is not None]
        return Dataset([item for item, _ in kept], [label for _, label in kept], list(class_names), name="generated")

    def _find(self, one: _Wanted) -> Item | None:
        if one.key in self._made:
            return ImageItem(one.prompt, self._made[one.key])
        path = self._path(one)
        return FileItem(str(path), label=one.prompt) if path is not None and path.is_file() else None

    def _path(self, one: _Wanted) -> Path | None:
        if self.folder is None:
            return None
        return Path(self.folder) / one.class_name.replace("/", "_") / f"{one.key}.png"

    def _make(self, batch: list[_Wanted]) -> None:
        generators = [torch.Generator().manual_seed(int(one.key[:15], 16)) for one in batch]
        output = self._load()([one.prompt for one in batch], generator=generators, **self.settings)
        images = getattr(output, "images", None)
        if not isinstance(images, list) or len(images) != len(batch) or not isinstance(images[0], Image.Image):
            raise ClipadaptError(f"The pipeline {self.name} must return `images`, one PIL image for each sentence.")
        blackened = getattr(output, "nsfw_content_detected", None) or [False] * len(batch)
        for one, image, bad in zip(batch, images, blackened, strict=True):
            path = self._path(one)
            if bad:
                self._blackened.add(one.key)
            elif path is None:
                self._made[one.key] = image
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                with written_aside(path) as aside:
                    image.save(aside, format="PNG")

    def _load(self) -> Any:
        if callable(self.pipeline):
            return self.pipeline
        if self._pipeline is None:
            try:
                import diffusers
            except ImportError as error:
                raise ClipadaptError(
                    f"{self.name} needs diffusers; install it with: pip install 'clipadapt[diffusers]'."
                ) from error
            logging = diffusers.utils.logging
            shown = logging.is_progress_bar_enabled()
            logging.disable_progress_bar()
            try:
                pipeline = diffusers.DiffusionPipeline.from_pretrained(self.pipeline).to(self.device)
            except (OSError, ValueError, AttributeError) as error:
                reason = str(error).strip().split("\n")[0]
                raise ClipadaptError(
                    f"diffusers cannot load a text-to-image pipeline from {self.name}: {reason}"
                ) from error
            finally:
                if shown:
                    logging.enable_progress_bar()
            pipeline.set_progress_bar_config(disable=True)
            self._pipeline = pipeline
        return self._pipeline


@dataclass(frozen=True)
class _Wanted:
    """One image to generate."""

    label: int
    class_name: str
    prompt: str
    key: str
