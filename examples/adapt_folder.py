"""Adapt a model to a folder of images, see how good it became, keep it, and use it.

    python examples/adapt_folder.py photos/        # one sub-folder per class

Without an argument it draws itself a folder of images, so that it runs as it is.
"""

import sys
import tempfile
from pathlib import Path

import clipadapt


def drawn_folder(root: Path) -> Path:
    """A folder per class, with images from the playground."""
    data = clipadapt.Playground(styles=("sketch", "photo")).dataset(20, kinds=("cat", "fish", "house", "key", "anchor"))
    for number, (item, label) in enumerate(zip(data.items, data.labels, strict=True)):
        folder = root / data.class_names[label]
        folder.mkdir(parents=True, exist_ok=True)
        item.open().save(folder / f"{number:03}.png")
    return root


def main(photos: Path, out: Path) -> None:
    backbone = clipadapt.load_backbone()  # the embedded model; give a hub id or a folder for a larger one
    train, test = clipadapt.image_folder(photos).split(test=0.3, seed=1)
    support = train.few_shot(8, seed=1)

    for key in ("zero-shot", "gda-clip"):
        model = clipadapt.create(key).fit(backbone, support)
        print(f"{key:10} {100 * model.score(test):5.1f} % of {len(test)} images that it has not seen")

    model.save(out)
    loaded = clipadapt.load(out)
    image = test.paths[0]
    probabilities = loaded.predict_proba([image])[0]  # (C,)
    for label in probabilities.argsort()[::-1][:3]:
        print(f"{image}: {loaded.class_names_[label]} {probabilities[label]:.3f}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        photos = Path(sys.argv[1]) if len(sys.argv) > 1 else drawn_folder(Path(scratch, "photos"))
        main(photos, out=Path(scratch, "adapted"))
