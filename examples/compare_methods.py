"""Which method suits my images? Compare several inside the support set, then check the winner on held-out images.

    python examples/compare_methods.py

The images are scikit-learn's handwritten digits, 16 of each. `clipadapt adapt` does the same for a folder.
"""

from sklearn.datasets import load_digits

import clipadapt
from clipadapt.evaluation.selection import select

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEMPLATE = "a picture of the digit {}."


def main() -> None:
    digits = load_digits()
    ink = (255 - digits.images * (255 / 16)).round().astype("uint8")  # (N, 8, 8) grey, dark on white
    train, test = clipadapt.image_list(ink, digits.target, NAMES).split(test=0.3, seed=1)
    support = train.few_shot(16, seed=1)
    backbone = clipadapt.load_backbone()

    # Cross-validation within the 160 images of the support set; nothing else is looked at. The methods that see
    # only features take a second; leave out `keys` to let prompts and weights compete too, within the budget.
    keys = ["gda-clip", "linear-probe", "tip-adapter"]
    selection = select(backbone, support, keys=keys, budget=30, templates=TEMPLATE)
    for trial in selection.trials:
        low, high = trial.interval
        print(f"{trial.key:13} {100 * trial.accuracy:5.1f} %  ({100 * low:.0f} to {100 * high:.0f})")
    for key, reason in selection.skipped:
        print(f"{key}: not tried, {reason}")
    print(f"Chosen: {selection.reason}.")

    model = selection.best.create().fit(backbone, support)
    print(f"On {len(test)} held-out images: {100 * model.score(test):.1f} %")


if __name__ == "__main__":
    main()
