"""What each saving of the contrastive trainer is worth: pairs per CPU second of one thread, and memory, both passes.

Run `python benchmarks/contrastive.py`; each line adds one saving to the line above, except the last, which trades time
for memory. Every case runs in a process of its own. The model is the preset "small" with texts of 8 tokens out of 32.
"""

from __future__ import annotations

import multiprocessing
import resource
import time

CASES = {  # precision, attention, tokens, share of patches dropped, chunk
    "fp32, texts padded, every patch": ("fp32", "sdpa", 32, 0.0, None),
    "+ texts at their true length": ("fp32", "sdpa", 8, 0.0, None),
    "+ bfloat16": ("bf16", "sdpa", 8, 0.0, None),
    "+ attention by plain matrix products": ("bf16", "eager", 8, 0.0, None),
    "+ half of the patches dropped": ("bf16", "eager", 8, 0.5, None),
    "with gradient caching, chunks of 32": ("bf16", "eager", 8, 0.5, 32),
}
PAIRS, REPEATS = 256, 4


def measure(precision: str, attention: str, tokens: int, dropped: float, chunk: int | None) -> tuple[float, float]:
    """Best pairs per CPU second of REPEATS steps, and the growth of the process's peak memory in MB."""
    import torch
    from transformers import CLIPTokenizer

    from clipadapt.backbones.scratch import new_backbone
    from clipadapt.training.pairs import Batch
    from clipadapt.training.towers import Towers, backward

    torch.set_num_threads(1)
    vocabulary = {f"word{index}": index for index in range(8000)} | {"<|startoftext|>": 8000, "<|endoftext|>": 8001}
    backbone = new_backbone(tokenizer=CLIPTokenizer(vocab=vocabulary, merges=[]))
    backbone.model.set_attn_implementation(attention)
    towers = Towers(backbone, precision).train()
    generator = torch.Generator().manual_seed(0)
    ids = torch.full((PAIRS, tokens), 8001)
    ids[:, :7] = torch.randint(0, 8000, (PAIRS, 7), generator=generator)
    keep = torch.rand(PAIRS, 36, generator=generator).argsort(dim=1)[:, int(36 * dropped) :] if dropped else None
    batch = Batch({"image": torch.randn(PAIRS, 3, 48, 48, generator=generator)}, {"text": ids}, {}, keep)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(REPEATS):
        started = time.process_time()
        backward(towers, batch, chunk)
        seconds.append(time.process_time() - started)
        towers.zero_grad()
    return PAIRS / min(seconds), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


if __name__ == "__main__":
    base = None
    for name, case in CASES.items():
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rate, memory = pool.apply(measure, case)
        base = base or rate
        print(f"{name:40s} {rate:5.0f} pairs/s  x{rate / base:4.2f}  {memory:5.0f} MB", flush=True)
