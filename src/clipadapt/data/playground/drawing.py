"""Images drawn by this code, with everything about them known, for trying every protocol without data.

A scene shows one object, several of a kind, two in a spatial relation, or one of each of several kinds; kind, colour,
size, texture, place, count and relation vary, and its style is its domain. Captions, masks and boxes are exact. A scene
depends on nothing but the playground's settings, its index and what was fixed, so scenes can be drawn in any order and
in any process.

    playground = Playground(size=64, kinds=TRAIN_KINDS, styles=TRAIN_STYLES, seed=0)
    image, caption = next(playground.pairs(1))
    data = Playground(kinds=HELDOUT_KINDS, seed=1).dataset(20)  # labelled by kind, styles as domains
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageChops

from clipadapt.data.items import GeneratedItem, Item
from clipadapt.data.playground.composition import (
    COUNTS,
    MOST_KINDS,
    RELATIONS,
    Plan,
    each,
    partners,
    pick,
    several,
    single,
    size_word,
    two,
)
from clipadapt.data.playground.kinds import SHAPES
from clipadapt.data.playground.styles import COLOURS, STYLES, TEXTURES, Cutout, cut_out
from clipadapt.errors import DataError, unknown_name

if TYPE_CHECKING:
    from clipadapt.data.examples import Dataset
    from clipadapt.data.multilabel import MultiLabelDataset

VERSION = 1  # of the drawing code: raise it when a scene changes, so that no cached feature outlives its image

KINDS = tuple(SHAPES)
HELDOUT_KINDS = ("anchor", "bell", "boat", "cactus", "hat", "key")  # never in the embedded model's training
HELDOUT_STYLE = "sketch"  # nor this style
TRAIN_KINDS = tuple(kind for kind in KINDS if kind not in HELDOUT_KINDS)
TRAIN_STYLES = tuple(style for style in STYLES if style != HELDOUT_STYLE)

By = Literal["kind", "colour", "texture", "count", "relation"]
_CLASSES: dict[By, Iterable[str]] = {
    "colour": COLOURS,
    "texture": TEXTURES,
    "count": COUNTS,
    "relation": RELATIONS,
}


class Obj(NamedTuple):
    """One object of a scene."""

    kind: str
    colour: str
    size: str  # small, medium or large
    texture: str
    box: tuple[int, int, int, int]  # left, top, right, bottom of the mask; right and bottom exclusive, pixels
    mask: np.ndarray  # (H, W) bool: the part of its silhouette that nothing covers


class Scene(NamedTuple):
    """An image and the truth about it."""

    image: Image.Image  # RGB, size x size
    caption: str  # one of `captions`, drawn at random
    captions: list[str]  # several true ones: with and without colour, size, texture, place
    objects: list[Obj]
    style: str
    relation: str | None  # of the first object to the second


@dataclass(frozen=True)
class Playground:
    """A world of scenes.

    Args:
        size: side of the square images in pixels, at least 32.
        kinds: object kinds that occur, from `KINDS`.
        styles: styles that occur, from `STYLES`.
        seed: another seed is another world with the same kinds and styles.

    Raises:
        ClipadaptError: a kind or style is unknown, or none is given.
    """

    size: int = 64
    kinds: tuple[str, ...] = KINDS
    styles: tuple[str, ...] = tuple(STYLES)
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", tuple(dict.fromkeys(self.kinds)))
        object.__setattr__(self, "styles", tuple(dict.fromkeys(self.styles)))
        if self.size < 32:
            raise DataError(f"A playground's size is at least 32 pixels, not {self.size}.")
        for word, given, known in (("kind", self.kinds, KINDS), ("style", self.styles, STYLES)):
            if not given:
                raise DataError(f"A playground needs at least one {word}.")
            for name in given:
                _check(f"playground {word}", name, known)

    def scene(
        self,
        index: int,
        *,
        kind: str | None = None,
        colour: str | None = None,
        texture: str | None = None,
        count: str | None = None,
        relation: str | None = None,
        style: str | None = None,
        kinds: Iterable[str] | None = None,
    ) -> Scene:
        """Scene number `index` (0, 1, …); what is None is drawn at random.

        A fixed `kind`, `colour` or `texture` alone gives a single object; with `count` it holds for all of them and
        with `relation` for the first of the two. `count` is a word of `COUNTS`, `relation` one of `RELATIONS`.
        `kinds`, 1 to 9 different ones, gives one object of each, apart from one another; only `style` goes with it.
        """
        for word, name, known in (
            ("kind", kind, KINDS),
            ("colour", colour, COLOURS),
            ("texture", texture, TEXTURES),
            ("count", count, COUNTS),
            ("relation", relation, RELATIONS),
            ("style", style, STYLES),
        ):
            if name is not None:
                _check(f"playground {word}", name, known)
        if count and relation:
            raise DataError("A playground scene has a count or a relation, not both.")
        if kinds is not None:
            kinds = tuple(kinds)
            for name in kinds:
                _check("playground kind", name, KINDS)
            if kind or colour or texture or count or relation:
                raise DataError("A playground scene with given kinds can fix nothing else but the style.")
            if not 1 <= len(set(kinds)) == len(kinds) <= MOST_KINDS:
                raise DataError(
                    f"A playground scene shows 1 to {MOST_KINDS} different kinds, not {', '.join(kinds) or 'none'}."
                )
        if index < 0:
            raise DataError(f"Playground scenes are numbered from 0; there is no scene {index}.")
        rng = np.random.default_rng([self.seed, index])
        style = style or pick(rng, self.styles)
        roll = rng.random()
        if kinds is not None:
            plans, captions = each(rng, kinds)
        elif relation or not (kind or colour or texture or count or roll < 0.75 or len(self.kinds) < 2):
            plans, captions, relation = two(rng, self.kinds, kind, colour, texture, relation)
        elif count or not (kind or colour or texture or roll < 0.55):
            plans, captions = several(rng, self.kinds, kind, colour, texture, count)
        else:
            plans, captions = single(rng, self.kinds, kind, colour, texture)
        caption = pick(rng, captions)
        cuts = self._place(rng, plans)
        # The first object covers the second when it is inside it; nothing else overlaps.
        image = STYLES[style].render(cuts[::-1], 2 * self.size, rng)
        objects = [
            Obj(plan.kind, plan.colour, size_word(plan.extent), plan.texture, _bounds(mask), mask)
            for plan, mask in zip(plans, self._masks(cuts), strict=True)
        ]
        return Scene(image, caption, captions, objects, style, relation)

    def pairs(self, n: int, seed: int | None = None) -> Iterator[tuple[Image.Image, str]]:
        """The images of scenes 0 to n - 1, each with a true caption; `seed` replaces the playground's own."""
        world = self if seed is None else replace(self, seed=seed)
        for index in range(n):
            scene = world.scene(index)
            yield scene.image, scene.caption

    def dataset(
        self,
        n_per_class: int,
        by: By = "kind",
        *,
        kinds: Iterable[str] | None = None,
        styles: Iterable[str] | None = None,
        seed: int | None = None,
    ) -> Dataset:
        """Images labelled `by` kind, colour, texture, count or relation; drawn when they are opened.

        Every class has `n_per_class` images, spread evenly over the styles, which are the data set's domains.
        A larger number keeps the earlier ones. Relation names are made for a prompt such as "one thing {} another".
        `kinds`, `styles` and `seed` replace the playground's own.
        """
        from clipadapt.data.examples import Dataset

        world = self._with(kinds, styles, seed)
        _check("way to label playground images", by, ("kind", *_CLASSES))
        names = list(world.kinds if by == "kind" else _CLASSES[by])
        if by == "relation":
            for name in names:
                partners(world.kinds, name)  # refuses kinds that lack a container now, not when an image is opened
        items: list[Item] = []
        labels, domains = [], []
        for label, name in enumerate(names):
            for i in range(n_per_class):
                index, style = i * len(names) + label, world.styles[i % len(world.styles)]
                fixed = {by: name, "style": style}
                items.append(world._item(name, i, index, fixed))
                labels.append(label)
                domains.append(style)
        return Dataset(items, labels, names, domains, name=f"playground by {by}")

    def multilabel(
        self,
        n: int,
        *,
        kinds: Iterable[str] | None = None,
        styles: Iterable[str] | None = None,
        seed: int | None = None,
        most: int = 3,
    ) -> MultiLabelDataset:
        """`n` images that each show 1 to `most` different kinds, labelled with them; drawn when they are opened.

        How many kinds an image shows, and which, is drawn evenly. Images are spread evenly over the styles,
        which are the data set's domains. A larger number keeps the earlier ones. `kinds`, `styles` and `seed` replace
        the playground's own.

        Raises:
            DataError: `most` exceeds the number of kinds, or 9.
        """
        from clipadapt.data.multilabel import MultiLabelDataset

        world = self._with(kinds, styles, seed)
        limit = min(len(world.kinds), MOST_KINDS)
        if not 1 <= most <= limit:
            raise DataError(
                f"most must be between 1 and {limit}, the number of kinds available or that fit in, not {most}."
            )
        items: list[Item] = []
        labels, domains = [], []
        for i in range(n):
            rng = np.random.default_rng([world.seed, i, 1])  # not the stream that draws the scene
            label = rng.permutation(len(world.kinds))[: int(rng.integers(1, most + 1))].tolist()
            shown, style = tuple(world.kinds[c] for c in label), world.styles[i % len(world.styles)]
            items.append(world._item("+".join(shown), i, i, {"kinds": shown, "style": style}))
            labels.append(frozenset(label))
            domains.append(style)
        return MultiLabelDataset(items, labels, list(world.kinds), domains, name="playground of several kinds")

    def _with(self, kinds: Iterable[str] | None, styles: Iterable[str] | None, seed: int | None) -> Playground:
        return replace(
            self,
            kinds=self.kinds if kinds is None else tuple(kinds),
            styles=self.styles if styles is None else tuple(styles),
            seed=self.seed if seed is None else seed,
        )

    def _item(self, what: str, number: int, index: int, fixed: dict[str, Any]) -> Item:
        """Scene `index` with what is `fixed`, to be drawn later; called image `number` of `what`."""
        return GeneratedItem(
            name=f"playground-{self.seed}/{fixed['style']}/{what}/{number}",
            key=f"playground {VERSION} {self} {index} {fixed}",
            draw=partial(_image, self, index, fixed),
        )

    def _place(self, rng: np.random.Generator, plans: list[Plan]) -> list[Cutout]:
        """The objects' cutouts on a canvas of twice the image's size, each a little turned, stretched and tinted."""
        canvas = 2 * self.size
        cuts = []
        for plan in plans:
            tint = np.clip(np.add(COLOURS[plan.colour], rng.integers(-10, 11, 3)), 0, 255).tolist()
            turn, stretch = rng.uniform(-9, 9), rng.uniform(0.93, 1.07) * (1 if rng.random() < 0.5 else -1)
            centre = (plan.centre[0] * canvas, plan.centre[1] * canvas)
            cuts.append(
                cut_out(plan.kind, tuple(tint), plan.texture, centre, plan.extent * canvas, turn, stretch, canvas)
            )
        return cuts

    def _masks(self, cuts: list[Cutout]) -> list[np.ndarray]:
        """Of each object the visible silhouette, (H, W) bool: pixels it fills more than half of."""
        layers = []
        for cut in cuts:
            layer = Image.new("L", (2 * self.size, 2 * self.size))
            layer.paste(cut.mask, cut.origin)
            layers.append(layer)
        visible = [layers[0], *(ImageChops.subtract(layer, layers[0]) for layer in layers[1:])]
        return [np.asarray(layer.reduce(2)) > 128 for layer in visible]


def _image(world: Playground, index: int, fixed: dict[str, Any]) -> Image.Image:
    return world.scene(index, **fixed).image


def _bounds(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _check(what: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise unknown_name(what, name, known)
