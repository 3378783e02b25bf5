"""Contrastive pre-training of a backbone on matched items, mostly image-text pairs (CLIP, arXiv 2103.00020).

The loop is `training.loop.train`; what is here is distribution, the log, and checkpoints.
Exact savings: text at its true length in the batch, gradient caching (arXiv 2101.06983), negatives from all processes.
What changes the result is named in the recipe: bfloat16 autocast, patch dropout (FLIP, arXiv 2212.00794).
Start it with `torchrun` or `accelerate launch` for several processes; the recipe's batch size is that of all together.
Each of them holds all weights (DDP), or with `sharded` its share of them (FSDP2); both equal one process.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clipadapt.backbones import Backbone
from clipadapt.backbones.preprocess import Preprocess
from clipadapt.errors import BackboneError, ClipadaptError
from clipadapt.losses.contrastive import contrast
from clipadapt.training.averages import Average
from clipadapt.training.checkpoint import renew_checkpoint, rewind_log, save_progress
from clipadapt.training.loop import Run, train
from clipadapt.training.objective import Objective, Terms
from clipadapt.training.pairs import Batch, Batches, PairSource
from clipadapt.training.recipe import Recipe
from clipadapt.training.schedules import cosine
from clipadapt.training.sharding import shard, whole
from clipadapt.training.towers import Towers, backward

Hook = Callable[[Backbone], Mapping[str, Any]]
MAX_LOG_SCALE = math.log(100)  # CLIP's bound on the logit scale, against instability


def adamw(towers: Towers, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays weight matrices only: no biases, norms, embeddings, class token or logit scale."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in towers.named_parameters():
        if parameter.requires_grad:
            embedding = name.endswith(("token_embedding.weight", "position_embedding.weight"))
            (free if parameter.ndim < 2 or embedding else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, eps=recipe.eps, fused=True)


def train_contrastive(
    backbone: Backbone,
    source: PairSource,
    recipe: Recipe,
    out: str | Path,
    *,
    objective: Objective = contrast,
    hooks: Mapping[str, Hook] | None = None,
    on_log: Callable[[dict[str, Any]], None] | None = None,
    sharded: bool | None = None,
) -> Backbone:
    """Train `backbone` in place on batches from `source`; returns a copy with the averaged weights (EMA).

    The run is in the folder `out`; one that holds a checkpoint is continued, on one CPU process bit for bit. It gets

        checkpoint.safetensors  every `checkpoint_every` steps, at the end, and on SIGTERM, which is then delivered;
        model/                  the averaged weights as a plain `transformers` folder, with every checkpoint;
        log.jsonl               every `log_every` steps: step, loss (nats, mean since the line before), its terms where
                                the objective names them, lr, scale, gradient_norm, pairs_per_second, data_wait (share
                                of the time), seconds (of the run);
                                per evaluation: step, seconds, evaluation {hook: {figure: value}}.

    Args:
        backbone: the start, with a tokenizer. With `sharded` it is left in pieces: use what is returned.
        source: its batches.
        recipe: the numbers.
        out: the folder.
        objective: what is minimised. With several processes it sees the share of one, and its mean over them is the
            loss: an objective that compares items with each other must gather them, as `info_nce` does.
        hooks: called with the averaged backbone every `evaluate_every` steps and at the end, without gradients.
        on_log: called with every record of the log. With several processes, hooks, log and files are the first one's.
        sharded: each process holds its share of weights, gradients and optimiser state (FSDP2) instead of all of them;
            by default if the launcher asks for it (`accelerate launch --use_fsdp`). A checkpoint is whole, so that a
            run may go on with another number of processes.

    Raises:
        ClipadaptError: the batch does not divide among the processes, the backbone cannot be trained so, or a gradient
            is not finite.
    """
    state = launched_processes()
    if recipe.batch_size % state.num_processes:
        raise ClipadaptError(f"batch_size {recipe.batch_size} does not divide among {state.num_processes} processes.")
    transform = _trainable(backbone, recipe)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)

    averaged = backbone.copy().to(state.device)
    averaged.source = str((out / "model").resolve())
    if state.device.type == "cpu":
        backbone.model.set_attn_implementation("eager")  # several times as fast there as sdpa while sequences are short
    towers = Towers(backbone.to(state.device), recipe.precision, recipe.towers, recipe.frozen).train()
    parallel: nn.Module = towers
    if sharded or (sharded is None and parse_flag_from_env("ACCELERATE_USE_FSDP")):
        if state.num_processes == 1:
            raise ClipadaptError("sharded needs several processes: start it with torchrun or accelerate launch.")
        shard(towers, [*backbone.blocks("vision"), *backbone.blocks("text")], state.device)
    elif state.num_processes > 1:
        parallel = DistributedDataParallel(towers)
    optimizer = adamw(towers, recipe)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    name_of = {parameter: name for name, parameter in towers.named_parameters()}
    names = [name_of[parameter] for parameter in trained]
    average = Average.ema(trained, recipe.ema_decay)

    def averaged_backbone() -> Backbone:  # asked of all processes, as each may hold a share only
        average.copy_to(averaged.model.get_parameter(name) for name in names)
        return averaged

    run = PretrainingRun(out, recipe, state, averaged_backbone, hooks or {}, on_log)
    if state.is_main_process and run.file.exists():
        renew_checkpoint(run.file, names)
    state.wait_for_everyone()

    def loss_of(batch: Batch) -> Terms:
        run.arrived = time.perf_counter()
        terms = backward(parallel, batch.to(state.device, transform.mean, transform.std), recipe.chunk, objective)
        norm = whole(nn.utils.clip_grad_norm_(towers.parameters(), recipe.clip_norm))
        if not norm.isfinite():  # nothing of it has reached the weights
            raise ClipadaptError(
                f"The gradient is {norm} at step {run.step + 1}: lower learning_rate or lengthen warmup."
            )
        run.gradient_norm = norm.item()
        return terms

    def after_step(number: int) -> None:
        with torch.no_grad():
            towers.logit_scale.clamp_(max=MAX_LOG_SCALE)
        run.scale = towers.logit_scale
        average.update(number)

    height, width = backbone.image_size
    batches = Batches(
        source, backbone.tokenizer, recipe, height, (height // backbone.patch_size) * (width // backbone.patch_size),
        backbone.context_length, state.process_index, state.num_processes,
    )  # fmt: skip
    with deferred_sigterm() as run.terminated:
        train(
            loss_of,
            optimizer,
            batches,
            schedule=lambda step: cosine(step, recipe.steps, recipe.warmup, recipe.floor),
            run=run,
            after_step=after_step,
            state=average.averages,
        )
    with torch.no_grad():
        for name in ("logit_scale", "logit_bias"):
            if (factor := getattr(towers, name)) is not None:
                getattr(backbone.model, name).copy_(whole(factor).squeeze())
    backbone.model.eval().requires_grad_(False)
    return averaged_backbone()


def _trainable(backbone: Backbone, recipe: Recipe) -> Preprocess:
    """The transform of a backbone that can be trained by `recipe`; raises otherwise."""
    if missing := {"texts", "weights"} - backbone.capabilities:
        raise BackboneError(
            f"{backbone.source} lacks {' and '.join(sorted(missing))}, which contrastive training needs."
        )
    if recipe.patch_dropout and "class-token" not in backbone.capabilities:
        raise BackboneError(f"patch_dropout needs an image tower with a class token, which {backbone.source} lacks.")
    config = backbone.model.config
    if any(getattr(part, "attention_dropout", 0) for part in (config.vision_config, config.text_config)):
        raise ClipadaptError("attention_dropout must be 0: its random choices could be neither cached nor resumed.")
    if not isinstance(backbone.preprocess, Preprocess):
        raise BackboneError(
            f"{backbone.source} does not say how it normalises pixels, which contrastive training needs."
        )
    return backbone.preprocess


class PretrainingRun(Run):
    """What surrounds the steps of `train_contrastive`: log, evaluations, checkpoints, and the signal to stop.

    All processes call its methods at the same steps; the first one writes.
    """

    def __init__(
        self,
        out: Path,
        recipe: Recipe,
        processes: PartialState,
        averaged: Callable[[], Backbone],
        hooks: Mapping[str, Hook],
        on_log: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        super().__init__(self._watch, out)
        self.file, self.log = out / "checkpoint.safetensors", out / "log.jsonl"
        self.out, self.recipe, self.processes = out, recipe, processes
        self.averaged, self.hooks, self.on_log = averaged, hooks, on_log
        self.terminated: Callable[[], bool] = lambda: False
        self.step = 0  # steps taken
        self.started = self.arrived = 0.0  # when the step under way began, and when its batch was there
        self.gradient_norm = 0.0
        self.scale = torch.zeros(1)  # logarithm of the multiplier
        self._clear()

    def _clear(self) -> None:
        self.lines: list[dict[str, float]] = []  # since the last line of the log: the loss and its terms
        self.waited = self.worked = 0.0

    def next_file(self) -> Path:
        return self.file

    def begin(self, first: int) -> None:
        self.step = first
        if self.processes.is_main_process:
            rewind_log(self.log, first)
        self.started = time.perf_counter()

    def _watch(self, line: dict[str, Any]) -> None:
        now, recipe = time.perf_counter(), self.recipe
        self.step = line["step"]
        self.waited, self.worked = self.waited + self.arrived - self.started, self.worked + now - self.started
        self.lines.append({"loss": line["loss"], **line.get("terms", {})})
        last = self.step == recipe.steps
        if last or self.step % recipe.log_every == 0:
            means = {name: self._mean([one[name] for one in self.lines]) for name in self.lines[0]}
            terms = {"terms": {name: means[name] for name in line["terms"]}} if "terms" in line else {}
            self._record(
                step=self.step, loss=means["loss"], **terms, lr=line["lr"],
                scale=whole(self.scale.detach()).exp().item(), gradient_norm=self.gradient_norm,
                pairs_per_second=round(len(self.lines) * recipe.batch_size / self.worked, 1),
                data_wait=round(self.waited / self.worked, 3), seconds=round(line["seconds"], 1),
            )  # fmt: skip
            self._clear()
        self.stopped = bool(over_processes(torch.tensor(float(self.terminated())), dist.ReduceOp.MAX))
        if not self.stopped and (last or (recipe.evaluate_every and self.step % recipe.evaluate_every == 0)):
            self._evaluate(line["seconds"])
        self.started = time.perf_counter()

    def _mean(self, values: list[float]) -> float:
        """Over these steps and all processes."""
        return float(over_processes(torch.tensor(values).mean(), dist.ReduceOp.SUM)) / self.processes.num_processes

    def _record(self, **values: Any) -> None:
        if self.processes.is_main_process:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
            if self.on_log:
                self.on_log(values)

    def _evaluate(self, seconds: float) -> None:
        backbone = self.averaged()
        if self.hooks and self.processes.is_main_process:
            with torch.no_grad():
                figures = {name: dict(hook(backbone)) for name, hook in self.hooks.items()}
            self._record(step=self.step, seconds=round(seconds, 1), evaluation=figures)
        self.processes.wait_for_everyone()

    def due(self, step: int, last: bool, seconds: float) -> bool:
        return self.stopped or last or step % self.recipe.checkpoint_every == 0

    def save(self, file: Path, kept: Sequence[Tensor], optimizer: torch.optim.Optimizer, *progress: Any) -> None:
        save_progress(file, kept, optimizer, *progress, write=self.processes.is_main_process)
        backbone = self.averaged()
        if self.processes.is_main_process:
            save_at_any_time(backbone, self.out / "model")
        self.processes.wait_for_everyone()
        self.started = time.perf_counter()


def save_at_any_time(backbone: Backbone, folder: Path) -> None:
    """Write a plain `transformers` folder that others may be reading: a file is replaced when the new one is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as aside:
        backbone.save(Path(aside, "model"))
        for file in sorted(Path(aside, "model").iterdir()):
            os.replace(file, folder / file.name)


def launched_processes() -> PartialState:
    """This process among those that a launcher started; alone without a launcher."""
    # Unless told that there is no accelerator, PartialState takes launched CPU processes for that many separate ones.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
    if dist.is_initialized():  # a process that ends while it is still connected may be aborted by its own threads
        atexit.unregister(_disconnect)
        atexit.register(_disconnect)
    return state


def _disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


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
