"""Contrastive pre-training of a CLIP on picture-text pairs (arXiv 2103.00020): one plain loop.

Exact savings: text at its true length in the batch, gradient caching (arXiv 2101.06983), negatives from all processes.
What changes the result is named in the recipe: bfloat16 autocast, patch dropout (FLIP, arXiv 2212.00794).
Start it with `torchrun` or `accelerate launch` for several processes; the recipe's batch size is that of all together.
Each of them holds all weights (DDP), or with `sharded` its share of them (FSDP2); both equal one process.
"""

from __future__ import annotations

import copy
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import CLIPModel, PreTrainedTokenizerBase

from clipadapt.backbones.scratch import save_clip
from clipadapt.errors import ClipadaptError
from clipadapt.losses.contrastive import info_nce
from clipadapt.training.averaging import EMA
from clipadapt.training.checkpoint import load_checkpoint, rewind_log, save_checkpoint
from clipadapt.training.pairs import Batch, Batches, PairSource
from clipadapt.training.recipe import Recipe
from clipadapt.training.schedules import cosine
from clipadapt.training.sharding import shard, whole

__all__ = ["Batch", "PairSource", "Recipe", "Towers", "backward", "train_contrastive"]

MAX_LOG_SCALE = math.log(100)  # CLIP's bound on the logit scale, against instability


class Towers(nn.Module):
    """Both towers of a CLIPModel, through its own parts, in one forward pass as DistributedDataParallel wants it.

    The parameters are the model's under the same names, except that the logit scale is a vector of one: sharded
    training (FSDP) refuses scalar parameters.
    """

    def __init__(self, model: CLIPModel, precision: str = "fp32") -> None:
        super().__init__()
        self.vision_model, self.visual_projection = model.vision_model, model.visual_projection
        self.text_model, self.text_projection = model.text_model, model.text_projection
        self.logit_scale = nn.Parameter(model.logit_scale.detach().clone().reshape(1))
        self.precision = precision

    def forward(self, pixels: Tensor, ids: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Picture features (B, D), text features (B, D), the multiplier of their cosines (1,)."""
        # Autocast begins here, not around the step: weights cast in a pass without gradients must not be reused.
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.encode_images(pixels, keep), self.encode_texts(ids), self.logit_scale.exp()

    def encode_images(self, pixels: Tensor, keep: Tensor | None = None) -> Tensor:
        """Unit-norm features (B, D) of pixels (B, 3, S, S), seen through the patches `keep` (B, K), or all of them."""
        hidden = self.vision_model.embeddings(pixels)  # (B, 1 + N, W)
        if keep is not None:
            kept = hidden[:, 1:].gather(1, keep[..., None].expand(-1, -1, hidden.shape[-1]))  # (B, K, W)
            hidden = torch.cat([hidden[:, :1], kept], dim=1)  # (B, 1 + K, W)
        hidden = self.vision_model.pre_layrnorm(hidden)
        hidden = self.vision_model.encoder(inputs_embeds=hidden).last_hidden_state
        pooled = self.vision_model.post_layernorm(hidden[:, 0])  # (B, W)
        return F.normalize(self.visual_projection(pooled).float(), dim=-1)

    def encode_texts(self, ids: Tensor) -> Tensor:
        """Unit-norm features (B, D) of token ids (B, L)."""
        pooled = self.text_model(input_ids=ids).pooler_output  # (B, W)
        return F.normalize(self.text_projection(pooled).float(), dim=-1)


def backward(towers: nn.Module, batch: Batch, chunk: int | None = None) -> Tensor:
    """Leave the gradient of the loss of `batch` in the parameters; returns the loss (), detached.

    towers: Towers, also shared out (FSDP2), or DistributedDataParallel around it. chunk: pairs per forward pass
    (gradient caching). With chunks, all features are computed first, without a graph; the loss gives their gradients;
    then each chunk is encoded again, and its share of those gradients goes back through the towers. The sum over chunks
    is the whole batch's gradient.
    """
    if chunk is None:
        loss = info_nce(*towers(*batch))
        loss.backward()
        return loss.detach()

    chunks = batch.split(chunk)
    with torch.no_grad():
        images, texts, scales = zip(*(towers(*part) for part in chunks), strict=True)
    features = [torch.cat(images), torch.cat(texts), scales[0]]  # (B, D), (B, D), (1,)
    loss = info_nce(*(feature.requires_grad_() for feature in features))
    image_grad, text_grad, scale_grad = torch.autograd.grad(loss, features)
    for index, part in enumerate(chunks):
        rows = slice(index * chunk, (index + 1) * chunk)
        last = index == len(chunks) - 1
        if isinstance(towers, FSDPModule):
            towers.set_requires_gradient_sync(last)
        with nullcontext() if last or not isinstance(towers, DistributedDataParallel) else towers.no_sync():
            torch.autograd.backward(towers(*part), [image_grad[rows], text_grad[rows], scale_grad / len(chunks)])
    return loss.detach()


def adamw(towers: Towers, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays weight matrices only: no biases, norms, embeddings, class token or logit scale."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in towers.named_parameters():
        embedding = name.endswith(("token_embedding.weight", "position_embedding.weight"))
        (free if parameter.ndim < 2 or embedding else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, eps=recipe.eps, fused=True)


def train_contrastive(
    model: CLIPModel,
    tokenizer: PreTrainedTokenizerBase,
    source: PairSource,
    recipe: Recipe,
    out: str | Path,
    *,
    hooks: Mapping[str, Callable[[CLIPModel], Mapping[str, float]]] | None = None,
    on_log: Callable[[dict[str, Any]], None] | None = None,
    sharded: bool | None = None,
) -> CLIPModel:
    """Train `model` in place on pairs from `source`; returns a copy with the averaged weights (EMA), in eval mode.

    out: folder of the run; one that holds a checkpoint is continued, on one CPU process bit for bit. It gets
        checkpoint.safetensors  every `checkpoint_every` steps, at the end, and on SIGTERM, which is then delivered;
        model/                  the averaged weights as a plain `transformers` folder, with every checkpoint;
        log.jsonl               every `log_every` steps: step, loss (nats, mean since the line before), lr, scale,
                                gradient_norm, pairs_per_second, data_wait (share of the time), seconds (of the run);
                                per evaluation: step, seconds, evaluation {hook: {figure: value}}.
    hooks: called with the averaged model every `evaluate_every` steps and at the end, without gradients.
    on_log: called with every record of the log. With several processes, hooks, log and files are the first one's.
    sharded: each process holds its share of weights, gradients and optimiser state (FSDP2) instead of all of them; by
        default if the launcher asks for it (`accelerate launch --use_fsdp`). `model` is then left in pieces: use what
        is returned. A checkpoint is whole, so that a run may go on with another number of processes.
    Raises ClipadaptError for a batch that does not divide among the processes, or a gradient that is not finite.
    """
    state = launched_processes()
    if recipe.batch_size % state.num_processes:
        raise ClipadaptError(f"batch_size {recipe.batch_size} does not divide among {state.num_processes} processes.")
    vision: Any = model.config.vision_config
    text: Any = model.config.text_config
    if vision.attention_dropout or text.attention_dropout:
        raise ClipadaptError("attention_dropout must be 0: its random choices could be neither cached nor resumed.")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint, log = out / "checkpoint.safetensors", out / "log.jsonl"

    averaged = copy.deepcopy(model).to(state.device).eval().requires_grad_(False)
    if state.device.type == "cpu":
        model.set_attn_implementation("eager")  # several times as fast there as sdpa while sequences are short
    towers = Towers(model.to(state.device), recipe.precision).train()
    parallel: nn.Module = towers
    if sharded or (sharded is None and parse_flag_from_env("ACCELERATE_USE_FSDP")):
        if state.num_processes == 1:
            raise ClipadaptError("sharded needs several processes: start it with torchrun or accelerate launch.")
        blocks = (*towers.vision_model.encoder.layers, *towers.text_model.encoder.layers)
        shard(towers, blocks, state.device)
    elif state.num_processes > 1:
        parallel = DistributedDataParallel(towers)
    optimizer = adamw(towers, recipe)
    ema = EMA(towers.parameters(), recipe.ema_decay)
    first, seconds = 0, 0.0
    if checkpoint.exists():
        progress = load_checkpoint(checkpoint, towers, ema, optimizer)
        first, seconds = progress["step"], progress["seconds"]
    began = time.perf_counter() - seconds

    def record(**values: Any) -> None:
        if state.is_main_process:
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
            if on_log:
                on_log(values)

    def average() -> CLIPModel:  # asked of all processes, as each may hold a share only
        ema.copy_to(averaged.get_parameter(name) for name, _ in towers.named_parameters())
        return averaged

    def store(step: int) -> None:
        progress = {"step": step, "seconds": time.perf_counter() - began}
        save_checkpoint(checkpoint, towers, ema, optimizer, progress, write=state.is_main_process)
        model = average()
        if state.is_main_process:
            save_clip(model, tokenizer, out / "model")
        state.wait_for_everyone()

    def evaluate(step: int) -> None:
        model = average()
        if hooks and state.is_main_process:
            with torch.no_grad():
                figures = {name: dict(hook(model)) for name, hook in hooks.items()}
            record(step=step, seconds=round(time.perf_counter() - began, 1), evaluation=figures)
        state.wait_for_everyone()

    if state.is_main_process:
        rewind_log(log, first)
    patches = (vision.image_size // vision.patch_size) ** 2
    batches = Batches(
        source, tokenizer, recipe, vision.image_size, patches, text.max_position_embeddings,
        state.process_index, state.num_processes,
    )  # fmt: skip
    losses, waited, worked = [], 0.0, 0.0  # since the last line of the log
    with deferred_sigterm() as terminated:
        started = time.perf_counter()
        for step, batch in enumerate(batches.stream(first), start=first + 1):
            arrived = time.perf_counter()
            rate = recipe.learning_rate * cosine(step - 1, recipe.steps, recipe.warmup, recipe.floor)
            for group in optimizer.param_groups:
                group["lr"] = rate
            losses.append(backward(parallel, batch.to(state.device), recipe.chunk))
            norm = whole(nn.utils.clip_grad_norm_(towers.parameters(), recipe.clip_norm))
            if not norm.isfinite():  # nothing of it has reached the weights
                raise ClipadaptError(f"The gradient is {norm} at step {step}: lower learning_rate or lengthen warmup.")
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                towers.logit_scale.clamp_(max=MAX_LOG_SCALE)
            ema.update()
            waited, worked = waited + arrived - started, worked + time.perf_counter() - started

            if step % recipe.log_every == 0 or step == recipe.steps:
                scale = whole(towers.logit_scale.detach()).exp().item()
                loss = float(over_processes(torch.stack(losses).mean(), dist.ReduceOp.SUM)) / state.num_processes
                record(
                    step=step, loss=loss, lr=rate, scale=scale, gradient_norm=norm.item(),
                    pairs_per_second=round(len(losses) * recipe.batch_size / worked, 1),
                    data_wait=round(waited / worked, 3), seconds=round(time.perf_counter() - began, 1),
                )  # fmt: skip
                losses, waited, worked = [], 0.0, 0.0
            stop = bool(over_processes(torch.tensor(float(terminated())), dist.ReduceOp.MAX))
            last = step == recipe.steps
            if not stop and (last or (recipe.evaluate_every and step % recipe.evaluate_every == 0)):
                evaluate(step)
            if stop or last or step % recipe.checkpoint_every == 0:
                store(step)
            if stop:
                break
            started = time.perf_counter()
    with torch.no_grad():
        model.logit_scale.copy_(whole(towers.logit_scale).squeeze())
    return average()


def launched_processes() -> PartialState:
    """This process among those that a launcher started; alone without a launcher."""
    # Unless told that there is no accelerator, PartialState takes launched CPU processes for so many lone ones.
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


def over_processes(value: Tensor, operation: Any) -> Tensor:
    """`value` (), reduced over all processes of the run."""
    if dist.is_initialized():
        value = value.to(PartialState().device)
        dist.all_reduce(value, operation)
    return value


@contextmanager
def deferred_sigterm() -> Iterator[Callable[[], bool]]:
    """Until the block ends a SIGTERM is only noted (the yielded function tells); it is delivered afterwards."""
    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread handle signals
        yield lambda: False
        return
    received: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGTERM, previous)
    if received:
        signal.raise_signal(signal.SIGTERM)
