"""Where support pictures come from when there are only class names: given, drawn, retrieved from a pool, or generated.

The two ways of SuS-X (arXiv 2211.16198), as the official repository vishaal27/SuS-X has them: `Retrieved` is SuS-LC
over a pool of one's own in place of LAION-5B, `Generated` is SuS-SD with any text-to-image pipeline of `diffusers`.

    source = Retrieved("any pictures, unsorted")         # or Generated("CompVis/stable-diffusion-v1-4")
    support = support_of(source, backbone, ["cat", "dog"], per_class=16, seed=1)
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from PIL import Image

from clipadapt.data import Dataset, FileItem, ImageItem, Item, as_items, class_texts, image_folder, picture_files
from clipadapt.errors import ClipadaptError, DataError
from clipadapt.features.classes import encode_classes
from clipadapt.features.encode import encode_images
from clipadapt.files import written_aside

if TYPE_CHECKING:
    from clipadapt.backbones import Backbone

OTHER_WORLD = 1_000_000  # added to a seed, so that the playground never draws pictures of a data set made of it

Prompts = Mapping[str, Sequence[str]]


@runtime_checkable
class ImageSource(Protocol):
    """Anything that finds or makes pictures of classes that are known by name."""

    def pictures(
        self,
        backbone: Backbone,
        class_names: Sequence[str],
        per_class: int,
        seed: int,
        prompts: Prompts | None = None,
    ) -> Dataset:
        """Pictures of `class_names`, about `per_class` of each; there may be others, under further class names.

        The same arguments give the same pictures. `prompts`, {class name: sentences}, take the place of the source's
        own sentences, if it has such; where a picture is made from one sentence, that is the picture's name.
        """
        ...


def image_source(value: Any) -> ImageSource:
    """The source that `value` stands for.

    Args:
        value: a `Dataset`; the path of a folder with one sub-folder per class; "playground", pictures drawn by
            `clipadapt.data.playground.drawing`; or an `ImageSource`.

    Raises:
        DataError: the folder does not exist, or is not divided into classes.
        ClipadaptError: it is something else.
    """
    if isinstance(value, Dataset):
        return Given(value)
    if isinstance(value, str | os.PathLike):
        return Drawn() if value == "playground" else Given(image_folder(value))
    if isinstance(value, ImageSource) and not isinstance(value, type):
        return value
    raise ClipadaptError(
        'A source of pictures is a Dataset, a folder of classes, "playground" or an object with a method pictures(), '
        f"not {value!r}."
    )


def support_of(
    source: Any,
    backbone: Backbone,
    class_names: Sequence[str],
    per_class: int,
    seed: int,
    prompts: Prompts | None = None,
) -> Dataset:
    """The pictures that `source` (what `image_source` takes) has of `class_names`, labelled in their order.

    Raises:
        ClipadaptError: it has no picture of one of them.
    """
    data = image_source(source).pictures(backbone, class_names, per_class, seed, prompts)
    shown = {name for name, count in zip(data.class_names, data.counts, strict=True) if count}
    missing = [name for name in class_names if name not in shown]
    if missing:
        raise ClipadaptError(
            f"The source {data.name} has no picture of {', '.join(map(repr, missing))}; it has pictures of "
            f"{', '.join(map(repr, sorted(shown))) or 'nothing'}."
        )
    return data.only(class_names)


@dataclass(frozen=True)
class Given:
    """Labelled pictures that are there already: all of them, however many."""

    data: Dataset

    @property
    def name(self) -> str:
        return self.data.name

    def pictures(
        self, backbone: Backbone, class_names: Sequence[str], per_class: int, seed: int, prompts: Prompts | None = None
    ) -> Dataset:
        return self.data


@dataclass(frozen=True)
class Drawn:
    """Pictures that `clipadapt.data.playground.drawing` draws: of few kinds of things, others are refused."""

    name: str = "playground"

    def pictures(
        self, backbone: Backbone, class_names: Sequence[str], per_class: int, seed: int, prompts: Prompts | None = None
    ) -> Dataset:
        from clipadapt.data.playground.drawing import KINDS, Playground

        unknown = [name for name in class_names if name not in KINDS]
        if unknown:
            raise ClipadaptError(
                f"Of these classes the playground cannot draw {', '.join(map(repr, unknown))}; it draws "
                f"{', '.join(KINDS)}. Give a data set or a folder of pictures."
            )
        size = max(32, *backbone.image_size)
        return Playground(size=size, kinds=tuple(sorted(class_names)), seed=OTHER_WORLD + seed).dataset(per_class)


@dataclass(frozen=True)
class Retrieved:
    """Of a pool of pictures, for each class those most similar to its text feature.

    pool       what `clipadapt.data.as_items` takes, or a folder; labels are not looked at, of copies one is used
    templates  of the sentences whose mean feature a class is sought by (see `clipadapt.data.class_texts`)
    name       what it is called in messages

    A picture may serve several classes. Nothing is random.
    """

    pool: Any = field(repr=False)
    templates: Any = "photo"
    name: str = "retrieved"

    def pictures(
        self, backbone: Backbone, class_names: Sequence[str], per_class: int, seed: int, prompts: Prompts | None = None
    ) -> Dataset:
        pool = self.pool
        if isinstance(pool, str | os.PathLike) and os.path.isdir(pool):
            pool = picture_files(pool)
        items = list({item.digest(): item for item in reversed(as_items(pool))}.values())[::-1]
        if len(items) < per_class:
            raise DataError(
                f"The pool {self.name!r} holds {len(items)} different pictures; {per_class} of each class are asked "
                "for, so give a larger pool or a smaller per_class."
            )
        texts = encode_classes(backbone, class_names, self.templates if prompts is None else prompts)  # (C, D)
        similarity = texts @ encode_images(backbone, items).features.T  # (C, P)
        nearest = similarity.sort(dim=1, descending=True, stable=True).indices[:, :per_class]  # (C, per_class)
        chosen = [items[row] for row in nearest.flatten().tolist()]
        labels = [label for label in range(len(class_names)) for _ in range(per_class)]
        return Dataset(chosen, labels, list(class_names), name=self.name)


@dataclass
class Generated:
    """Pictures that a text-to-image pipeline of `diffusers` makes of sentences, kept for as long as this object lives.

    pipeline    such a pipeline, or the folder or hub id of one (needs the extra [diffusers])
    templates   of the sentences (see `clipadapt.data.class_texts`); a class's are taken in turn
    settings    what the pipeline is called with besides prompts and generators (defaults: SuS-SD's)
    folder      where to keep the pictures, as PNG files in a sub-folder per class; what is there is not made again
    batch_size  pictures per call of the pipeline (SuS-SD: 5)
    device      where a pipeline that is loaded goes; one that is given stays where it is

    Each picture has a `torch.Generator` of its own on the CPU, seeded by `seed`, class, sentence and its number, so
    that it depends neither on the batch nor on the order of classes. What the pipeline's safety checker blackens is
    left out. A saved model keeps this source's name only.
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
                f"The pipeline must be one of diffusers, or the folder or hub id of one, not {self.pipeline!r}."
            )
        if self.batch_size < 1:
            raise ClipadaptError(f"batch_size must be at least 1, not {self.batch_size}.")

    @property
    def name(self) -> str:
        if callable(self.pipeline):
            return getattr(self.pipeline, "name_or_path", None) or type(self.pipeline).__name__
        return os.fspath(self.pipeline)

    def pictures(
        self, backbone: Backbone, class_names: Sequence[str], per_class: int, seed: int, prompts: Prompts | None = None
    ) -> Dataset:
        wanted: list[_Wanted] = []
        sentences = class_texts(class_names, self.templates if prompts is None else prompts)
        for label, (name, own) in enumerate(zip(class_names, sentences, strict=True)):
            for number in range(per_class):
                prompt = own[number % len(own)]
                facts = json.dumps([self.name, dict(self.settings), name, prompt, seed, number], default=str)
                wanted.append(_Wanted(label, name, prompt, blake2b(facts.encode(), digest_size=16).hexdigest()))
        missing = [one for one in wanted if one.key not in self._blackened and self._kept(one) is None]
        for start in range(0, len(missing), self.batch_size):
            self._make(missing[start : start + self.batch_size])
        kept = [(item, one.label) for one in wanted if (item := self._kept(one)) is not None]
        return Dataset([item for item, _ in kept], [label for _, label in kept], list(class_names), name="generated")

    def _kept(self, one: _Wanted) -> Item | None:
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
        output = self._loaded()([one.prompt for one in batch], generator=generators, **self.settings)
        images = getattr(output, "images", None)
        if not isinstance(images, list) or len(images) != len(batch) or not isinstance(images[0], Image.Image):
            raise ClipadaptError(f"The pipeline {self.name} must return `images`, one PIL picture for each sentence.")
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

    def _loaded(self) -> Any:
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
                    f"diffusers can load no text-to-image pipeline from {self.name}: {reason}"
                ) from error
            finally:
                if shown:
                    logging.enable_progress_bar()
            pipeline.set_progress_bar_config(disable=True)
            self._pipeline = pipeline
        return self._pipeline


@dataclass(frozen=True)
class _Wanted:
    """One picture to generate."""

    label: int
    class_name: str
    prompt: str
    key: str
