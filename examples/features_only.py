"""Adapt without any model or image: on features that you already have, as numpy arrays.

    python examples/features_only.py

The features here are made up. Yours come from any two-tower model: image features of labelled images, and one
text feature per class (the mean over its prompts). They need not have unit length.
"""

import tempfile

import numpy as np

import clipadapt

CLASSES, DIM, SHOTS = 20, 64, 8


def features(per_class: int, centres: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Image features (N, D) scattered around their class's centre, and labels (N,)."""
    labels = np.repeat(np.arange(len(centres)), per_class)
    return centres[labels] + 1.6 * rng.normal(size=(len(labels), DIM)), labels


def main() -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(CLASSES, DIM))
    text_features = centres + 2.5 * rng.normal(size=centres.shape)  # (C, D): texts know the classes only roughly
    images, labels = features(SHOTS, centres, rng)
    val = features(4, centres, rng)
    test_images, test_labels = features(50, centres, rng)

    for key in ("zero-shot", "tip-adapter", "gda-clip", "linear-probe"):
        head = clipadapt.create(key).fit_features(images, labels, text_features, logit_scale=100.0, val=val)
        predicted = head.logits(test_images).argmax(axis=1)  # (N, C) -> (N,)
        print(f"{key:12} {100 * np.mean(predicted == test_labels):5.1f} %")

    with tempfile.TemporaryDirectory() as folder:
        head.save(folder)
        same = clipadapt.load(folder)  # needs no backbone, as none was used
        assert np.array_equal(same.logits(test_images), head.logits(test_images))


if __name__ == "__main__":
    main()
