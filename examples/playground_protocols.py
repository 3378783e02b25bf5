"""Two protocols of the field, tried on drawn images: new classes, and a domain that was never learned from.

    python examples/playground_protocols.py

Kinds of objects are classes, drawing styles are domains; "key", "bell", "hat" and the style "sketch" were kept out of
the embedded model's training.
"""

import clipadapt
from clipadapt.backbones import Backbone
from clipadapt.data import Dataset

KINDS = ("cat", "bird", "fish", "house", "tree", "car", "cup", "key", "bell", "hat")
STYLES = ("flat", "watercolour", "chalk")
UNSEEN_STYLE = "sketch"


def percent(method: str, backbone: Backbone, support: Dataset, test: Dataset) -> str:
    return f"{100 * clipadapt.create(method).fit(backbone, support).score(test):5.1f} %"


def base_to_new(backbone: Backbone) -> None:
    """Learn the first half of the classes; be judged on them, and zero-shot on the other half, which is new."""
    data = clipadapt.Playground(kinds=KINDS, styles=STYLES).dataset(24)
    train, test = data.split(test=0.5, seed=1)
    (base_train, _), (base_test, new_test) = train.base_new_split(), test.base_new_split()
    support = base_train.few_shot(8, seed=1)
    print(f"base to new: {', '.join(support.class_names)}; new: {', '.join(new_test.class_names)}")
    for method in ("zero-shot", "tip-adapter"):
        print(f"  {method:12} base {percent(method, backbone, support, base_test)}")
    # A method that learns one weight per class knows nothing of other classes; class texts do.
    zero_shot = clipadapt.create("zero-shot").fit(backbone, class_names=new_test.class_names)
    print(f"  {'zero-shot':12} new  {100 * zero_shot.score(new_test):5.1f} %")


def domains(backbone: Backbone) -> None:
    """Learn from some styles; be judged on new images of each of them, and of a style that was not there."""
    world = clipadapt.Playground(kinds=KINDS)
    support = world.dataset(12, styles=STYLES, seed=1)
    print("domains:")
    for style in (*STYLES, UNSEEN_STYLE):
        test = world.dataset(12, styles=[style], seed=2)
        figures = [f"{method} {percent(method, backbone, support, test)}" for method in ("zero-shot", "gda-clip")]
        print(f"  {style:12} {'   '.join(figures)}{'   (not learned from)' if style == UNSEEN_STYLE else ''}")


if __name__ == "__main__":
    embedded = clipadapt.load_backbone()
    base_to_new(embedded)
    domains(embedded)
