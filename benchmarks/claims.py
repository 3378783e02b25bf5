"""Does each method do here what its paper says it does? Writes claims.jsonl and the table of docs/evidence.md.

    python benchmarks/claims.py            # the tests that are marked `claim`, the experiments below, and cells
    python benchmarks/claims.py --cells    # only what the other .jsonl files give; the rest stays as it is

A claim sets a method beside what it is to be better than, in pairs: the same seed, data and encoder. It shows where the
95 % bootstrap interval of the mean difference to each of these is above zero, it does not where one is below, and all
else is within noise. Where a claim says "no worse", an interval that reaches zero is enough. A test fails if its claim
does not hold; what stands in cells and in the experiments below may turn out either way, and is printed either way.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipadapt.backbones import load_backbone
from clipadapt.data.playground.drawing import TRAIN_KINDS, TRAIN_STYLES, Playground, Scene
from clipadapt.evaluation.bench.run import Row, read_rows, versions
from clipadapt.evaluation.statistics import compare
from clipadapt.features.viewpoints import turned
from clipadapt.methods import create, list_methods

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "evidence.md"


@dataclass(frozen=True)
class Claim:
    """`figures`: shares in [0, 1] in pairs (blocks); first the method's, then those of what it is compared with."""

    method: str
    says: str
    figures: dict[str, list[float]]
    source: str

    def verdict(self) -> str:
        own, *others = self.figures.values()
        intervals = [compare(own, other).interval for other in others]
        if any(high < 0 for _, high in intervals):
            return "no"
        if "no worse" in self.says or all(low > 0 for low, _ in intervals):
            return "yes"
        return "within noise"


# -- cells of other files --------------------------------------------------------------------------------------------


def rows(name: str) -> list[Row]:
    return read_rows(HERE / name)


def paired(
    table: Iterable[Row], names: Sequence[str], who: str, block: Callable[[Row], Any], value: Callable[[Row], float]
) -> dict[str, list[float]]:
    """Figures of `names`, which rows have under the key `who`, in the order of the blocks that all of them have."""
    found: dict[str, dict[Any, float]] = defaultdict(dict)
    for row in table:
        if row[who] in names:
            found[row[who]][block(row)] = value(row)
    common = sorted(set.intersection(*(set(found[name]) for name in names)), key=str)
    if not common:
        raise SystemExit(f"Nothing to compare: {', '.join(names)}.")
    return {name: [found[name][key] for key in common] for name in names}


SHOTS = (1, 2, 4, 8, 16)
# On whu-rs19, two encoders, seeds 1-3: method, shots, what it is compared with.
FEATURES: list[tuple[str, tuple[int, ...], tuple[str, ...]]] = [
    ("tip-adapter", SHOTS, ("zero-shot",)),
    ("tip-adapter-f", (16,), ("tip-adapter",)),
    ("gda-clip", (16,), ("zero-shot", "tip-adapter")),
    ("proker", SHOTS, ("tip-adapter",)),
    ("ape", (16,), ("tip-adapter",)),
    ("ape-t", (16,), ("tip-adapter-f",)),
    ("linear-probe", (16,), ("zero-shot",)),
    ("clip-adapter", (16,), ("zero-shot",)),
    ("taskres", SHOTS, ("zero-shot", "clip-adapter")),
    ("cross-modal-probe", SHOTS, ("linear-probe",)),
    ("lp++", (1, 2, 4), ("linear-probe",)),
    ("reco", SHOTS, ("zero-shot",)),
]
# Base to new on drawn things (`prompts.jsonl`), harmonic mean: method, what it is compared with.
PROMPTS: list[tuple[str, tuple[str, ...]]] = [
    ("cocoop", ("coop",)),
    ("kgcoop", ("coop",)),
    ("prograd", ("coop",)),
    ("pre", ("coop",)),
    ("eco", ("coop",)),
    ("mocoop", ("coop",)),
    ("maple", ("coop", "ivlp")),
    ("promptsrc", ("coop", "ivlp")),
    ("gopro", ("coop",)),
    ("sync-clip", ("ivlp",)),
    ("map", ("coop",)),
    ("ivlp", ("coop",)),
    ("vpt", ("zero-shot",)),
]
# Under a shift of style (`robust.jsonl`): method, figure, what it is compared with.
ROBUST: list[tuple[str, str, tuple[str, ...]]] = [
    ("fine-tune", "learned_styles", ("zero-shot",)),
    ("full-fine-tune", "learned_styles", ("zero-shot",)),
    ("flyp", "other_styles", ("full-fine-tune",)),
    ("clipood", "other_kinds", ("full-fine-tune",)),
    ("saft", "other_styles", ("full-fine-tune", "saft, random mask")),
    ("saft", "other_kinds", ("full-fine-tune",)),
    ("clip-lora", "other_styles", ("fine-tune",)),
    ("r-adapter", "other_styles", ("full-fine-tune",)),
    ("r-adapter", "other_kinds", ("full-fine-tune",)),
    ("m2-mix", "other_styles", ("flyp",)),
]
STYLES = {
    "learned_styles": "new pictures in the learned styles",
    "other_styles": "the same kinds in four other styles",
    "other_kinds": "six other kinds, by their names",
}


def run_of(row: Row) -> Any:
    """What pairs cells of a suite."""
    return row["backbone"], row["options"]["shots"], row["seed"]


def figure(*path: str) -> Callable[[Row], float]:
    """What stands in a row under these keys."""

    def of(row: Row) -> float:
        found: Any = row
        for key in path:
            found = found[key]
        return found

    return of


def from_cells() -> Iterator[Claim]:
    whu = [row for row in rows("few_shot.jsonl") if row["data"] == "whu-rs19" and "figures" in row]
    accuracy, harmonic = figure("figures", "accuracy"), figure("figures", "harmonic")
    for method, shots, others in FEATURES:
        there = [row for row in whu if row["options"]["shots"] in shots]
        says = f"real CLIP features, {', '.join(map(str, shots))} shots"
        yield Claim(method, says, paired(there, (method, *others), "label", run_of, accuracy), "few_shot.jsonl")
    says = "real CLIP features, labelled shots: no worse than tip-adapter"
    yield Claim("sus-x", says, paired(whu, ("sus-x", "tip-adapter"), "label", run_of, accuracy), "few_shot.jsonl")

    new = [row for row in rows("whu_base_to_new.jsonl") if "figures" in row]
    for method in ("multi-modal-adapter", "gda-clip"):
        figures = paired(new, (method, "zero-shot"), "label", run_of, harmonic)
        yield Claim(method, "real CLIP features, base to new, 4 and 16 shots: H", figures, "whu_base_to_new.jsonl")

    towers = [row for row in rows("playground_towers.jsonl") if row["options"]["shots"] in (1, 4, 16)]
    figures = paired(towers, ("clip-lora", "coop", "maple"), "label", run_of, accuracy)
    yield Claim("clip-lora", "18 drawn kinds, 1, 4, 16 shots, one setting", figures, "playground_towers.jsonl")

    def of_task(row: Row) -> Any:
        return row["task"], row["seed"]

    drawn = [row for row in rows("prompts.jsonl") if row["task"] in ("kinds", "coloured") and "harmonic" in row]
    for method, others in PROMPTS:
        figures = paired(drawn, (method, *others), "method", of_task, figure("harmonic"))
        yield Claim(method, "drawn things, base to new, 16 shots: H", figures, "prompts.jsonl")
    figures = paired(drawn, ("coop", "zero-shot"), "method", of_task, figure("base"))
    yield Claim("coop", "drawn things, 16 shots, the learned classes", figures, "prompts.jsonl")

    shifted = [row for row in rows("robust.jsonl") if "learned_styles" in row]
    for method, part, others in ROBUST:
        figures = paired(shifted, (method, *others), "row", figure("seed"), figure(part))
        yield Claim(method, f"six drawn kinds in three styles; {STYLES[part]}", figures, "robust.jsonl")
    tuned = [row for row in shifted if row["row"] == "full-fine-tune"]
    halfway = {"wise-ft": [row["half_other_kinds"] for row in tuned], "alpha 1": [row["other_kinds"] for row in tuned]}
    yield Claim("wise-ft", f"full-fine-tune, alpha 0.5; {STYLES['other_kinds']}", halfway, "robust.jsonl")

    there = [row for row in rows("transductive.jsonl") if row["data"] == "whu-rs19" and "figures" in row]
    says = "real CLIP features, unlabelled test pictures, 0 to 16 shots"
    figures = paired(there, ("transclip", "zero-shot"), "label", run_of, accuracy)
    yield Claim("transclip", says, figures, "transductive.jsonl")

    attacked = [row for row in rows("adversarial_tecoa.jsonl") if "figures" in row]
    for radius in ("1", "2", "4"):
        labels = ("tecoa, radius 1", "tuned without attacks", "zero-shot")
        figures = paired(attacked, labels, "label", figure("seed"), figure("details", "attacked", radius))
        yield Claim(
            "tecoa", f"18 drawn kinds, 40 shots, PGD of radius {radius}/255", figures, "adversarial_tecoa.jsonl"
        )


# -- experiments -----------------------------------------------------------------------------------------------------


def known_boxes(scene: Scene) -> Callable[..., tuple[list[Any], list[float], list[int]]]:
    """A detector that finds a drawing's things by their kinds, exactly."""

    def detect(image: Any, names: list[str]) -> tuple[list[Any], list[float], list[int]]:
        found = [(number, o.box) for number, name in enumerate(names) for o in scene.objects if name.endswith(o.kind)]
        return [box for _, box in found], [1.0] * len(found), [number for number, _ in found]

    return detect


def comclip() -> Claim:
    """Which of two drawings a caption is of, where one of two things differs; boxes are known."""
    backbone = load_backbone()
    right: dict[str, list[float]] = defaultdict(list)
    for seed in (1, 2, 3):
        world = Playground(size=96, kinds=TRAIN_KINDS[::6], styles=TRAIN_STYLES, seed=20 + seed)
        scenes = [world.scene(i, relation="left of") for i in range(150)]
        rng = np.random.default_rng(seed)
        hits: dict[str, list[bool]] = defaultdict(list)
        for number in rng.permutation(150)[:60]:
            own = [o.kind for o in scenes[number].objects]
            place = int(rng.integers(2))  # of the thing that both show
            others = [
                scene
                for scene in scenes
                if scene.objects[place].kind == own[place] and scene.objects[1 - place].kind not in own
            ]
            if not others:
                continue
            pair = scenes[number], others[rng.integers(len(others))]
            caption = [f"a {own[0]} to the left of a {own[1]}", "a house"]
            for name, weights in (("comclip", "sum"), ("equal weights", "equal")):
                scores = [
                    create("comclip", detector=known_boxes(scene), weights=weights)
                    .fit(backbone, class_names=caption)
                    .image_logits([scene.image])[0][0, 0]
                    for scene in pair
                ]
                hits[name].append(bool(scores[0] > scores[1]))
            plain = create("zero-shot", templates="{}").fit(backbone, class_names=caption)
            scores = plain.image_logits([scene.image for scene in pair])[0][:, 0]
            hits["whole picture"].append(bool(scores[0] > scores[1]))
        for name, values in hits.items():
            right[name].append(float(np.mean(values)))
    return Claim("comclip", "which of two drawings, with one thing changed, a caption is of", dict(right), "claims.py")


def omniview_tuning() -> Claim:
    """Sketches learned flat and from the side, then seen from further aside; the same training without alignment."""
    backbone, kinds = load_backbone(), TRAIN_KINDS[::9]
    found: dict[str, list[float]] = defaultdict(list)
    for seed in (1, 2, 3):
        support = Playground(kinds=kinds, styles=TRAIN_STYLES, seed=seed).dataset(12)
        flat = Playground(kinds=kinds, styles=TRAIN_STYLES, seed=100 + seed).dataset(24)
        test = turned(flat, 1, tilt=60.0, roll=45.0, seed=seed)
        settings = {"views": 2, "lr": 3e-3, "epochs": 4, "batch_size": 16, "seed": seed}
        for name, weight in (("omniview-tuning", 1.0), ("the same views, not aligned", 0.0)):
            model = create("omniview-tuning", weight=weight, **settings).fit(backbone, support)
            found[name].append(model.score(test))
        found["zero-shot"].append(create("zero-shot").fit(backbone, class_names=list(kinds)).score(test))
    return Claim("omniview-tuning", "drawn things seen from further aside than learned", dict(found), "claims.py")


def caps_adapter() -> Claim:
    """Kinds that the model hardly knows: the same drawn support with its captions as a second cache, and without."""
    backbone = load_backbone()
    found: dict[str, list[float]] = defaultdict(list)
    names = ("anchor", "bell", "boat", "cactus", "hat", "key", "mushroom", "umbrella")
    for seed in (1, 2, 3):
        world = Playground(kinds=names, styles=TRAIN_STYLES, seed=seed)
        support = world.dataset(8)
        captions = {n: f"a {support.class_names[c]}" for n, c in zip(support.paths, support.labels, strict=True)}
        test = Playground(kinds=names, styles=TRAIN_STYLES, seed=100 + seed).dataset(30)
        found["caps-adapter"].append(create("caps-adapter", captions=captions).fit(backbone, support).score(test))
        found["sus-x"].append(create("sus-x").fit(backbone, support).score(test))
        found["zero-shot"].append(create("zero-shot").fit(backbone, support).score(test))
    return Claim("caps-adapter", "eight unknown kinds, 8 shots: captions beside pictures", dict(found), "claims.py")


EXPERIMENTS = (caps_adapter, comclip, omniview_tuning)


# -- tests -----------------------------------------------------------------------------------------------------------


class Kept:
    """A plugin of pytest that keeps what tests hand to the fixture `claim`; values of the same claim are joined."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], dict[str, list[float]]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call":
            return
        for name, value in report.user_properties:
            if name == "claim" and isinstance(value, dict):
                figures = self.found.setdefault((value["method"], value["claim"]), {})
                for of, values in value["figures"].items():
                    figures.setdefault(of, []).extend(values)


def from_tests() -> list[Claim]:
    kept = Kept()
    if pytest.main(["-q", "-m", "claim", str(HERE.parent / "tests" / "methods")], plugins=[kept]) != 0:
        raise SystemExit("A test of a claim failed; see above.")
    return [Claim(method, says, figures, "tests/methods") for (method, says), figures in kept.found.items()]


# -- the page --------------------------------------------------------------------------------------------------------


def page(claims: list[Claim]) -> str:
    lines = [
        "| method | where | figures, % | difference (interval) | pairs | shows | from |",
        "|---|---|---|---|---|---|---|",
    ]
    for claim in sorted(claims, key=lambda c: (c.method, c.says)):
        own, *others = claim.figures.values()
        figures = ", ".join(f"{name} {100 * np.mean(values):.1f}" for name, values in claim.figures.items())
        differences = [compare(own, other) for other in others]
        apart = "; ".join(
            f"{100 * d.mean:+.1f} ({100 * d.interval[0]:.1f} to {100 * d.interval[1]:.1f})" for d in differences
        )
        cells = (f"`{claim.method}`", claim.says, figures, apart, str(len(own)), claim.verdict(), claim.source)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", action="store_true", help="take tests and experiments from claims.jsonl as they are")
    given = parser.parse_args()
    file, facts = HERE / "claims.jsonl", versions()
    cells = [facts | asdict(claim) for claim in from_cells()]  # first: a cell that is missing is known at once
    if given.cells:
        before = [row for row in rows(file.name) if not row["source"].endswith(".jsonl")]
    else:
        before = [facts | asdict(claim) for claim in (*from_tests(), *(run() for run in EXPERIMENTS))]
    lines: list[Row] = [*before, *cells]
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    claims = [Claim(**{key: line[key] for key in ("method", "says", "figures", "source")}) for line in lines]
    missing = sorted(set(list_methods()) - {claim.method for claim in claims})
    table = page(claims)
    head, rest = PAGE.read_text(encoding="utf-8").split("<!-- table -->\n")
    PAGE.write_text(f"{head}<!-- table -->\n{table}\n<!-- end{rest.split('<!-- end', 1)[1]}", encoding="utf-8")
    print(table)
    print(f"\n{len(claims)} claims; no claim yet: {', '.join(missing) or 'none'}")


if __name__ == "__main__":
    main()
