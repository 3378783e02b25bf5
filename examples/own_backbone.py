"""Use a model of your own: a transformers folder on disk, adapted with LoRA and exported for any other program.

    python examples/own_backbone.py path/to/folder      # or a hub id, such as openai/clip-vit-base-patch16

Without an argument it takes a folder written from the embedded model, so that it runs as it is.
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModel

import clipadapt


def main(source: str, scratch: Path) -> None:
    backbone = clipadapt.load_backbone(source)
    print(backbone)
    print("can:", ", ".join(sorted(backbone.capabilities)))

    # Patch features are in the same space as texts: where in the image is what the text says?
    scene = clipadapt.Playground(size=96).scene(5, kind="cat")
    pixels = backbone.preprocess(scene.image).unsqueeze(0)  # (1, 3, H, W)
    with torch.no_grad():
        tokens = backbone.encode_images(pixels, tokens=True)
        text = backbone.encode_texts(["a photo of a cat."])  # (1, D)
    heat = (tokens.patches[0] @ text[0]).unflatten(0, tokens.grid)  # (h, w) cosines
    print(f"{heat.shape[0]} x {heat.shape[1]} patches, cosines from {heat.min():.2f} to {heat.max():.2f}")

    # A few steps of LoRA, merged into the weights; the paper takes 500 steps a shot.
    data = clipadapt.Playground(styles=("sketch",)).dataset(10, kinds=("cat", "fish", "house", "key"))
    train, test = data.split(test=0.5, seed=1)
    model = clipadapt.create("clip-lora", steps_per_shot=2, lr=2e-3, min_scale=0.9).fit(backbone, train)
    zero_shot = clipadapt.create("zero-shot").fit(backbone, train)
    print(f"zero-shot {100 * zero_shot.score(test):.0f} %, after LoRA {100 * model.score(test):.0f} %")

    model.export(scratch / "adapted")  # a plain transformers folder
    print("read by transformers as", type(AutoModel.from_pretrained(scratch / "adapted")).__name__)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        given = sys.argv[1] if len(sys.argv) > 1 else None
        if given is None:
            given = f"{folder}/my-clip"
            clipadapt.load_backbone().save(given)
        main(given, Path(folder))
