"""Ships a finished run of `clipadapt pretrain` as the embedded model, and measures what was shipped.

    python benchmarks/embedded.py RUN CORPUS

copies RUN/model as float16 into src/clipadapt/backbones/embedded, evaluates that folder as anyone would load it, and
writes benchmarks/embedded.json (figures) and benchmarks/embedded_log.jsonl (the curve of loss).
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
from importlib.metadata import version
from pathlib import Path

import torch

from clipadapt.backbones import load_backbone
from clipadapt.backbones.scratch import save_clip
from clipadapt.data.corpus.pairs import Corpus
from clipadapt.evaluation.studies.pretraining import corpus_hooks

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = ROOT / "src/clipadapt/backbones/embedded"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run (--out of `clipadapt pretrain run`)")
    parser.add_argument("corpus", type=Path, help="folder of the corpus")
    options = parser.parse_args()

    trained = load_backbone(options.run / "model")
    save_clip(trained.model, trained.tokenizer, EMBEDDED, dtype=torch.float16)

    backbone = load_backbone(EMBEDDED)
    corpus = Corpus.open(options.corpus)
    figures = {name: hook(backbone) for name, hook in corpus_hooks(corpus, backbone.image_size[0]).items()}
    for name, values in figures.items():
        print(name, json.dumps(values))

    log = [json.loads(line) for line in (options.run / "log.jsonl").read_text().splitlines()]
    last = [record for record in log if "loss" in record][-1]
    recipe = json.loads((ROOT / "examples/pretrain/recipe.json").read_text())
    facts = json.loads((options.corpus / "corpus.json").read_text())
    results = {
        "figures": figures,
        "training": {
            "steps": last["step"],
            "pairs": last["step"] * recipe["batch_size"],
            "seconds": last["seconds"],
            "last_loss": last["loss"],
            "pictures": facts["splits"],
        },
        "model": {
            "parameters": sum(parameter.numel() for parameter in backbone.model.parameters()),
            "bytes": sum(file.stat().st_size for file in EMBEDDED.iterdir()),
            "vocabulary": len(backbone.tokenizer),
        },
        "recipe": recipe,
        "versions": {name: version(name) for name in ("torch", "transformers")} | {"python": platform.python_version()},
    }
    (ROOT / "benchmarks/embedded.json").write_text(json.dumps(results, indent=1) + "\n")
    shutil.copy(options.run / "log.jsonl", ROOT / "benchmarks/embedded_log.jsonl")


if __name__ == "__main__":
    main()
