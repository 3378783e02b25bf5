"""What the prompt encoder saves: time and memory of class prompts, against the plain computation, side by side.

    python benchmarks/text_engine.py [--json] [--classes 1000] [--cases coop-4 ...]
    python benchmarks/text_engine.py --epoch            # a whole CoOp epoch: 1,000 classes, 16 shots, cached features

The backbone has ViT-B/16's text shape (width 512, 12 blocks, 8 heads, 77 rows) and random weights; names have the
lengths of ImageNet's (2.17 tokens on average, 12 at most). A case encodes all prompts and takes the gradient to the
learned vectors. "Plain" is transformers' own forward on all 77 rows of every prompt, in batches of 100 prompts whose
gradients add up, since one batch of 1,000 would keep about 37 GB; this favours it. Its CoCoOp is the published loop
over pictures. Each case runs in a fresh process, so that its peak memory is its own; memory is compared at
`memory_classes` prompts in one batch on both sides, as training would hold them, above what the process held before.

One JSON line a case: case, ratio_time, ratio_memory, max_rel_diff (of features and of gradients, each relative to its
largest value), and the seconds and MiB behind them. `--dtype bfloat16` measures both sides in bf16, and `--device cuda`
both on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from clipadapt.backbones import Backbone, Insertion
from clipadapt.backbones.families import Pretrained
from clipadapt.training.loop import batches, train

START, PERIOD, END, LENGTH, WIDTH = 49406, 269, 49407, 77, 512
# How many of ImageNet's 1,000 class names have 1, 2, ... tokens: mean 2.17, largest 12 (few-shot-field.md 5).
NAME_LENGTHS = {1: 350, 2: 340, 3: 190, 4: 75, 5: 27, 6: 10, 7: 4, 8: 2, 9: 1, 12: 1}
CASES = ("coop-4", "coop-16", "class-specific-16", "deep-4", "cocoop-4")
CASE_CLASSES = {"cocoop-4": 100}  # batch 8; all others take --classes
PICTURES = 8


def backbone(device: str, dtype: torch.dtype) -> Backbone:
    """A CLIP with ViT-B/16's text tower and the smallest image tower."""
    torch.manual_seed(0)
    text = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "max_position_embeddings": LENGTH,
        "vocab_size": 49408,
        "bos_token_id": START,
        "eos_token_id": END,
        "hidden_act": "quick_gelu",
    }
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.CLIPConfig(
        text_config=text, vision_config=vision | {"image_size": 32, "patch_size": 16}, projection_dim=WIDTH
    )
    model = transformers.CLIPModel._from_config(config, attn_implementation="sdpa").to(dtype)
    return Backbone("random", Pretrained("clip", model, transformers.CLIPImageProcessorPil(), None), device)


def prompts(classes: int, n_ctx: int) -> Tensor:
    """Token ids (C, 77) of prompts with `n_ctx` rows for learned vectors behind the start."""
    rng = random.Random(0)
    lengths = rng.choices(list(NAME_LENGTHS), list(NAME_LENGTHS.values()), k=classes)
    if classes == sum(NAME_LENGTHS.values()):
        lengths = [length for length, count in NAME_LENGTHS.items() for _ in range(count)]
    ids = torch.zeros(classes, LENGTH, dtype=torch.int64)
    for row, length in zip(ids, lengths, strict=True):
        name = [rng.randrange(1000, 40000) for _ in range(length)]
        row[: n_ctx + length + 3] = torch.tensor([START, *[343] * n_ctx, *name, PERIOD, END])
    return ids


def insertions_of(case: str, classes: int, device: str, dtype: torch.dtype) -> list[Insertion]:
    kind, _, n = case.rpartition("-")
    generator = torch.Generator().manual_seed(1)

    def vectors(*shape: int) -> Tensor:
        return (0.02 * torch.randn(*shape, int(n), WIDTH, generator=generator)).to(device, dtype).requires_grad_()

    if kind == "deep":  # nine layers, as MaPLe and PromptSRC
        return [Insertion(vectors(), at=1, layer=layer or "input") for layer in range(9)]
    shape = {"coop": (), "class-specific": (classes,), "cocoop": (PICTURES, 1)}[kind]
    return [Insertion(vectors(*shape), at=1)]


def ours(tower: Backbone, ids: Tensor, insertions: list[Insertion], weights: Tensor) -> Tensor:
    encoder = tower.prompt_encoder(ids)
    features = encoder(insertions)
    (features * weights).sum().backward()
    return features.detach()


def plain(tower: Backbone, ids: Tensor, insertions: list[Insertion], weights: Tensor, at_once: int) -> Tensor:
    """All 77 rows of `at_once` prompts at a time; one picture after the other where contexts are the pictures'."""
    grouped = insertions[0].tokens.ndim == 4
    pictures = range(len(insertions[0].tokens)) if grouped else [None]
    features = []
    for picture in pictures:
        mine = []
        for start in range(0, len(ids), at_once):
            rows = slice(start, start + at_once)
            part = [
                Insertion(
                    i.tokens[picture, 0] if grouped else i.tokens[rows] if i.tokens.ndim == 3 else i.tokens,
                    i.at,
                    i.layer,
                )
                for i in insertions
            ]
            with tower.inserted(text=part):
                out = normalize(tower.model.get_text_features(ids[rows].to(tower.device)).pooler_output, dim=-1)
            ((weights[picture, rows] if grouped else weights[rows]) * out).sum().backward()
            mine.append(out.detach())
        features.append(torch.cat(mine))
    return torch.stack(features) if grouped else features[0]


def measure(case: str, side: str, classes: int, at_once: int, device: str, dtype: torch.dtype, repeats: int) -> dict:
    """Seconds (the least of `repeats`), MiB above what was held before, features and gradients of one side."""
    tower, ids = backbone(device, dtype), prompts(classes, int(case.rpartition("-")[2]))
    insertions = insertions_of(case, classes, device, dtype)
    groups = (PICTURES,) if case.startswith("cocoop") else ()
    weights = torch.randn(*groups, classes, WIDTH, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    run: Callable[[], Tensor] = lambda: (  # noqa: E731
        ours(tower, ids, insertions, weights) if side == "ours" else plain(tower, ids, insertions, weights, at_once)
    )
    warm = slice(0, 8)  # kernels are chosen and buffers made on a few prompts
    few = [Insertion(i.tokens[warm] if i.tokens.ndim == 3 else i.tokens, i.at, i.layer) for i in insertions]
    (ours if side == "ours" else lambda *a: plain(*a, 8))(tower, ids[warm], few, weights[..., warm, :])
    before, seconds = memory(device), []
    for _ in range(repeats):
        for insertion in insertions:
            insertion.tokens.grad = None
        begun = time.perf_counter()
        features = run()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return {
        "seconds": min(seconds),
        "mib": memory(device) - before,
        "features": features,
        "gradients": [i.tokens.grad for i in insertions],
    }


def memory(device: str) -> float:
    """Peak MiB so far."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def in_a_process(file: str, *arguments: Any) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", file, *map(str, arguments)]
    subprocess.run(command, check=True)
    result = torch.load(file, weights_only=True)
    os.unlink(file)
    return result


def compare(case: str, options: argparse.Namespace) -> dict[str, Any]:
    classes = min(options.classes, CASE_CLASSES.get(case, options.classes))
    few = min(options.memory_classes, classes)
    file = os.path.join(tempfile.gettempdir(), f"text_engine_{os.getpid()}.pt")
    common = [case, options.device, options.dtype]
    fast = in_a_process(file, "ours", classes, 0, 3, *common)
    slow = in_a_process(file, "plain", classes, 100, 1, *common)
    small = in_a_process(file, "ours", few, 0, 1, *common)
    large = in_a_process(file, "plain", few, few, 1, *common)

    def difference(name: str) -> float:
        pairs = [(fast[name], slow[name])] if name == "features" else zip(fast[name], slow[name], strict=True)
        return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)

    return {
        "case": case,
        "classes": classes,
        "ratio_time": slow["seconds"] / fast["seconds"],
        "ratio_memory": large["mib"] / small["mib"],
        "max_rel_diff": max(difference("features"), difference("gradients")),
        "seconds": fast["seconds"],
        "seconds_plain": slow["seconds"],
        "mib": fast["mib"],
        "memory_classes": few,
        "mib_at_memory_classes": small["mib"],
        "mib_plain_at_memory_classes": large["mib"],
        "device": options.device,
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def epoch(options: argparse.Namespace) -> dict[str, Any]:
    """One epoch of CoOp as published, on random features: 16 shots of 1,000 classes, batches of 32, 16 vectors."""
    classes, shots = options.classes, 16
    tower, ids = backbone(options.device, torch.float32), prompts(classes, 16)
    encoder = tower.prompt_encoder(ids)
    images = normalize(torch.randn(classes * shots, WIDTH, generator=torch.Generator().manual_seed(3)), dim=-1)
    images, labels = images.to(options.device), torch.arange(classes).repeat_interleave(shots).to(options.device)
    context = insertions_of("coop-16", classes, options.device, torch.float32)[0].tokens
    steps = batches(len(images), 32, epochs=1, seed=1)[: options.steps]
    begun = time.perf_counter()

    def loss_of(rows: Tensor) -> Tensor:
        return cross_entropy(100 * images[rows] @ encoder([Insertion(context, at=1)]).T, labels[rows])

    losses = train(loss_of, torch.optim.SGD([context], lr=2e-3, momentum=0.9, weight_decay=5e-4), steps)
    seconds, peak = time.perf_counter() - begun, memory(options.device)
    begun = time.perf_counter()
    plain(tower, ids[:100], [Insertion(context, at=1)], torch.ones(100, WIDTH, device=options.device), 100)
    plain_step = (time.perf_counter() - begun) * classes / 100
    return {
        "case": "coop-epoch",
        "classes": classes,
        "pictures": len(images),
        "steps": len(losses),
        "steps_of_an_epoch": -(-len(images) // 32),
        "seconds": seconds,
        "seconds_a_step": seconds / len(losses),
        "seconds_plain_a_step": plain_step,
        "ratio_time": plain_step * len(losses) / seconds,
        "peak_mib": peak,
        "device": options.device,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--memory-classes", type=int, default=200, help="prompts at which peak memory is compared")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--epoch", action="store_true", help="time a CoOp epoch instead")
    parser.add_argument("--steps", type=int, default=None, help="of --epoch: only so many steps")
    parser.add_argument("--measure", nargs=8, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        file, side, classes, at_once, repeats, case, device, dtype = options.measure
        result = measure(case, side, int(classes), int(at_once), device, getattr(torch, dtype), int(repeats))
        torch.save(result, file)
        return
    if options.epoch:
        print(json.dumps(epoch(options)))
        return
    if not options.json:
        print("| case | prompts | plain | clipadapt | faster | memory | largest difference |\n" + "|---" * 7 + "|")
    for case in options.cases:
        row = compare(case, options)
        if options.json:
            print(json.dumps(row), flush=True)
        else:
            print(
                f"| {case} | {row['classes']:,} | {row['seconds_plain']:.1f} s | {row['seconds']:.2f} s | "
                f"{row['ratio_time']:.0f} x | 1/{row['ratio_memory']:.0f} | {row['max_rel_diff']:.0e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
