import json
import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from clipadapt.backbones import Backbone, load_backbone
from clipadapt.backbones.scratch import new_backbone
from clipadapt.errors import ArtifactError, ClipadaptError
from clipadapt.losses.contrastive import contrast
from clipadapt.training.contrastive import adamw, train_contrastive
from clipadapt.training.pairs import Batch, Batches
from clipadapt.training.recipe import Recipe
from clipadapt.training.towers import Towers, backward
from tests.processes import FORKED

RECIPE = Recipe(
    steps=6, batch_size=8, learning_rate=3e-3, warmup=2, patch_dropout=0.5, unmasked_tuning=0.3, ema_decay=0.9,
    precision="fp32", workers=0, log_every=1, evaluate_every=3, checkpoint_every=3,
)  # fmt: skip


def letters_tokenizer() -> CLIPTokenizer:
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    return CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])


class Squares:
    """64 images of two coloured halves; a text spells the two colours, some of them twice."""

    def batch(self, step, batch_size, image_size, seed):
        chosen = np.random.default_rng([seed, step]).permutation(64)[:batch_size]
        pixels = np.zeros((batch_size, 3, image_size, image_size), np.uint8)
        pixels[:, 0, :, : image_size // 2] = (chosen // 8 * 36)[:, None, None]
        pixels[:, 1, :, image_size // 2 :] = (chosen % 8 * 36)[:, None, None]
        texts = [f"{chr(97 + row // 8)} {chr(105 + row % 8)}" * (1 + row % 2) for row in chosen]
        return pixels, texts


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order: runs are compared bit for bit
    yield
    torch.set_num_threads(threads)


def fresh() -> Backbone:
    return new_backbone("tiny", tokenizer=letters_tokenizer(), seed=1)


def some_batch(recipe: Recipe = RECIPE, step: int = 0, **shares: int) -> Batch:
    batches = Batches(Squares(), letters_tokenizer(), recipe, 16, 16, 16, **shares)
    return batches[step].to(torch.device("cpu"))


def gradients(towers: Towers, batch: Batch, chunk: int | None) -> tuple[float, torch.Tensor]:
    towers.zero_grad()
    loss = backward(towers, batch, chunk)
    return loss.item(), torch.cat([p.grad.flatten() for p in towers.parameters() if p.grad is not None])


# Towers


def test_without_patch_dropout_the_towers_are_the_model():
    backbone = fresh()
    model, batch = backbone.model, some_batch(replace(RECIPE, patch_dropout=0.0))
    out = Towers(backbone)(batch)
    image, text, scale = out["image"], out["text"], out["scale"]
    expected = model(input_ids=batch.ids["text"], pixel_values=batch.images["image"])
    assert batch.keep is None
    pooled = model.get_image_features(batch.images["image"]).pooler_output
    assert torch.equal(image, torch.nn.functional.normalize(pooled, dim=-1))
    torch.testing.assert_close(image, expected.image_embeds, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(text, expected.text_embeds, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scale * image @ text.T, expected.logits_per_image, rtol=1e-5, atol=1e-5)


def test_patch_dropout_sees_the_kept_patches_and_no_other():
    towers, batch = Towers(fresh()), some_batch()
    pixels = batch.images["image"]
    assert batch.keep.shape == (8, 8)  # half of 4 x 4 patches
    everything = torch.arange(16).flip(0).expand(8, -1)
    torch.testing.assert_close(
        towers.encode_images(pixels, everything), towers.encode_images(pixels), rtol=1e-5, atol=1e-5
    )
    patches = torch.zeros(8, 16).scatter_(1, batch.keep, 1.0).reshape(8, 1, 4, 4)
    kept = patches.repeat_interleave(4, 2).repeat_interleave(4, 3).bool()  # (B, 1, 16, 16), pixels of kept patches
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    seen = towers.encode_images(pixels, batch.keep)
    assert torch.equal(seen, towers.encode_images(torch.where(kept, pixels, noise), batch.keep))
    assert not torch.allclose(seen, towers.encode_images(torch.where(kept, noise, pixels), batch.keep))


def test_text_at_its_true_length_equals_padded_text():
    backbone = fresh()
    tokenizer, texts = backbone.tokenizer, ["a b", "c", "d e f g"]
    short = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
    padded = tokenizer(texts, padding="max_length", max_length=16, return_tensors="pt")["input_ids"]
    assert short.shape == (3, 6)
    towers = Towers(backbone)
    torch.testing.assert_close(towers.encode_texts(short), towers.encode_texts(padded), rtol=1e-5, atol=1e-6)


# One step


@pytest.mark.parametrize("chunk", [1, 3, 8, 100])
def test_gradient_caching_is_exact_under_patch_dropout(chunk):
    towers, batch = Towers(fresh()), some_batch()
    loss, plain = gradients(towers, batch, None)
    cached_loss, cached = gradients(towers, batch, chunk)
    assert cached_loss == pytest.approx(loss, rel=1e-6)
    assert (cached - plain).norm() <= 1e-5 * plain.norm()


def test_gradient_caching_in_bfloat16_reaches_every_parameter():
    towers, batch = Towers(fresh(), "bf16"), some_batch()
    _, plain = gradients(towers, batch, None)
    _, cached = gradients(towers, batch, 4)
    assert (cached - plain).norm() <= 0.02 * plain.norm()


def test_only_weight_matrices_decay():
    towers = Towers(fresh())
    names = {id(parameter): name for name, parameter in towers.named_parameters()}
    decayed, free = ({names[id(p)] for p in group["params"]} for group in adamw(towers, RECIPE).param_groups)
    matrices = ("_proj.weight", "fc1.weight", "fc2.weight", "_projection.weight", "patch_embedding.weight")
    assert decayed == {name for name in names.values() if name.endswith(matrices)}
    assert free == set(names.values()) - decayed


# Batches


def test_shares_of_two_processes_make_the_whole_batch():
    whole, halves = some_batch(step=1), [some_batch(step=1, rank=rank, world=2) for rank in range(2)]
    assert torch.equal(torch.cat([half.images["image"] for half in halves]), whole.images["image"])
    assert torch.equal(torch.cat([half.keep for half in halves]), whole.keep)
    assert sum(half.size for half in halves) == whole.size == 8


def test_workers_prepare_the_same_batches():
    recipe = replace(RECIPE, workers=2)
    arguments = (letters_tokenizer(), recipe, 16, 16, 16)
    ahead = list(Batches(Squares(), *arguments).stream(1))
    assert len(ahead) == 5
    for step, batch in enumerate(ahead, start=1):
        plain = Batches(Squares(), *arguments)[step]
        assert torch.equal(batch.images["image"], plain.images["image"])
        assert torch.equal(batch.ids["text"], plain.ids["text"])
    assert ahead[0].keep.shape == (8, 8)
    assert ahead[-1].keep is None  # the unmasked end of the run


class Torn(Squares):
    """Has a batch that cannot be read."""

    def batch(self, step, *arguments):
        if step == 2:
            raise ClipadaptError("images/2.png cannot be read")
        return super().batch(step, *arguments)


@pytest.mark.parametrize("source", [Squares(), Torn()])
def test_no_worker_outlives_a_failed_run(source, tmp_path):
    """They ignore the signal that Python ends its children with, so that it would wait for them for ever."""

    def objective(out):
        if isinstance(source, Torn):
            return contrast(out)
        raise ClipadaptError("images/2.png cannot be read")

    with pytest.raises(ClipadaptError, match="cannot be read") as held:  # which keeps what the traceback refers to
        train_contrastive(fresh(), source, replace(RECIPE, workers=1), tmp_path, objective=objective)
    assert not multiprocessing.active_children(), held


def test_bytes_are_normalised_as_clip_does():
    raw = Batch({"image": torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)}, {}, {})
    white = (1 - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = raw.to(torch.device("cpu")).images["image"]
    torch.testing.assert_close(pixels[0, :, 0, 0], white)
    assert Batch({"image": pixels}, {}, {}).to(torch.device("cpu")).images["image"] is pixels
    halves = raw.to(torch.device("cpu"), mean=(0.5,) * 3, std=(0.25,) * 3).images["image"]
    assert torch.equal(halves, torch.full((1, 3, 2, 2), 2.0))


# Runs


def test_a_run_learns_logs_evaluates_and_saves(tmp_path):
    backbone = fresh()
    seen = []
    recipe = replace(RECIPE, steps=60, precision="bf16", workers=1, log_every=20, evaluate_every=30)
    hooks = {"scale": lambda averaged: {"scale": averaged.logit_scale, "training": float(averaged.model.training)}}
    averaged = train_contrastive(backbone, Squares(), recipe, tmp_path, hooks=hooks, on_log=seen.append)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == seen
    steps, evaluations = ([line for line in lines if ("evaluation" in line) is wanted] for wanted in (False, True))
    assert [line["step"] for line in steps] == [20, 40, 60]
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]
    assert set(steps[0]) == {
        "step", "loss", "lr", "scale", "gradient_norm", "pairs_per_second", "data_wait", "seconds",
    }  # fmt: skip
    assert [line["step"] for line in evaluations] == [30, 60]
    assert evaluations[-1]["evaluation"]["scale"] == {"scale": averaged.logit_scale, "training": 0.0}
    assert averaged.source == str(tmp_path / "model")
    assert load_backbone(averaged.source).fingerprint == averaged.fingerprint != backbone.fingerprint
    for trained in (averaged, backbone):
        assert not any(module.training for module in trained.model.modules())
        assert not any(parameter.requires_grad for parameter in trained.model.parameters())


def test_logit_scale_stays_at_or_below_100(tmp_path):
    backbone = fresh()
    backbone.model.logit_scale.data.fill_(6.0)
    train_contrastive(backbone, Squares(), replace(RECIPE, steps=1, learning_rate=1e-6), tmp_path)
    assert backbone.model.logit_scale.exp().item() == pytest.approx(100.0, rel=1e-5)
    assert backbone.model.logit_scale.shape == ()


def interrupted_run(out: Path, number: int, step: int) -> None:
    """Ends itself by a signal within step `step`."""
    torch.set_num_threads(1)

    class Interrupted(Squares):
        def batch(self, at, *arguments):
            if at == step - 1:
                os.kill(os.getpid(), number)
            return super().batch(at, *arguments)

    train_contrastive(fresh(), Interrupted(), RECIPE, out)


def test_killed_and_continued_runs_equal_an_uninterrupted_one(tmp_path):
    cases = {"terminated": (signal.SIGTERM, 4), "killed": (signal.SIGKILL, 5)}  # checkpoints are then of steps 4 and 3
    processes = {}
    for name, case in cases.items():
        processes[name] = FORKED.Process(target=interrupted_run, args=(tmp_path / name, *case))
        processes[name].start()
    whole = train_contrastive(fresh(), Squares(), RECIPE, tmp_path / "whole")
    for name, process in processes.items():
        process.join()
        assert process.exitcode == -cases[name][0]
        assert json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[-1])["step"] == 4
        continued = train_contrastive(fresh(), Squares(), RECIPE, tmp_path / name)
        for key, tensor in whole.model.state_dict().items():
            assert torch.equal(continued.model.state_dict()[key], tensor), key
        ours, theirs = (load_file(tmp_path / run / "checkpoint.safetensors") for run in (name, "whole"))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs if key != "random")  # nothing is drawn from it
        losses = [
            [(line["step"], line["loss"]) for line in map(json.loads, log.read_text().splitlines())]
            for log in (tmp_path / name / "log.jsonl", tmp_path / "whole" / "log.jsonl")
        ]
        assert losses[0] == losses[1]


def test_the_schedule_follows_a_length_changed_on_the_way(tmp_path):
    train_contrastive(fresh(), Squares(), replace(RECIPE, steps=4, warmup=0), tmp_path)
    train_contrastive(fresh(), Squares(), replace(RECIPE, steps=8, warmup=0), tmp_path)
    rates = [json.loads(line)["lr"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rates[3] == pytest.approx(3e-3 * 0.5 * (1 + np.cos(np.pi * 3 / 4)))
    assert rates[4:] == pytest.approx([3e-3 * 0.5 * (1 + np.cos(np.pi * step / 8)) for step in range(4, 8)])


def one_of_two(rank: int, out: Path, sharded: bool) -> None:
    # accelerate asks for an address, but the processes meet at a file: a port that was free may be taken by now
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    os.environ.update({key: str(value) for key, value in launched.items()}, ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=2)
    recipe = replace(RECIPE, steps=4, chunk=3, checkpoint_every=2)
    train_contrastive(fresh(), Squares(), replace(recipe, steps=2), out / "half", sharded=sharded)
    train_contrastive(fresh(), Squares(), recipe, out / "half", sharded=sharded)  # goes on from a checkpoint
    averaged = train_contrastive(fresh(), Squares(), recipe, out / "whole", sharded=sharded)
    torch.save(averaged.model.state_dict(), out / f"averaged-{rank}.pt")
    with pytest.raises(ClipadaptError, match="7 does not divide among 2 processes"):
        train_contrastive(fresh(), Squares(), replace(RECIPE, batch_size=7), out / "odd")
    dist.destroy_process_group()


def weights(run: Path) -> torch.Tensor:
    """Of a checkpoint, the present ones and the averaged ones."""
    stored = load_file(run / "checkpoint.safetensors")
    return torch.cat([stored[key].flatten() for key in sorted(stored) if key.startswith("kept.")])


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_with_gradient_caching_equal_one_without(tmp_path, sharded):
    processes = [FORKED.Process(target=one_of_two, args=(rank, tmp_path, sharded)) for rank in range(2)]
    for process in processes:
        process.start()
    expected = train_contrastive(fresh(), Squares(), replace(RECIPE, steps=4), tmp_path / "one")
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    one, two = weights(tmp_path / "one"), weights(tmp_path / "whole")
    assert (one - two).norm() <= 1e-5 * one.norm()
    assert (one - two).abs().max() <= 1e-5  # a step of Adam is 3e-3 per weight
    torch.testing.assert_close(weights(tmp_path / "half"), two, atol=1e-5, rtol=0)
    for rank in range(2):  # every process gets the whole averaged model
        averaged = torch.load(tmp_path / f"averaged-{rank}.pt", weights_only=True)
        for name, tensor in expected.model.state_dict().items():
            torch.testing.assert_close(averaged[name], tensor, atol=1e-5, rtol=0)
    logs = ((tmp_path / run / "log.jsonl").read_text().splitlines() for run in ("one", "whole"))
    for ours, theirs in zip(*logs, strict=True):
        for figure in ("loss", "gradient_norm", "scale"):
            if figure in json.loads(ours):
                assert json.loads(ours)[figure] == pytest.approx(json.loads(theirs)[figure], rel=1e-5)


# Refusals


def test_a_recipe_comes_from_json_and_names_what_is_wrong(tmp_path):
    file = tmp_path / "recipe.json"
    file.write_text('{"steps": 10, "batch_size": 4, "betas": [0.9, 0.95]}')
    assert Recipe.load(file) == Recipe(steps=10, batch_size=4, betas=(0.9, 0.95))
    with pytest.raises(ClipadaptError, match="'learning_rat'; did you mean 'learning_rate'"):
        Recipe.from_dict({"steps": 1, "batch_size": 2, "learning_rat": 1})
    with pytest.raises(ClipadaptError, match="lacks 'batch_size'"):
        Recipe.from_dict({"steps": 1})
    with pytest.raises(ClipadaptError, match="precision"):
        Recipe(steps=1, batch_size=2, precision="fp16")
    with pytest.raises(ClipadaptError, match="patch_dropout"):
        Recipe(steps=1, batch_size=2, patch_dropout=1.0)
    file.write_text("{")
    with pytest.raises(ClipadaptError, match=r"recipe\.json"):
        Recipe.load(file)


def test_a_damaged_or_foreign_checkpoint_is_named(tmp_path):
    train_contrastive(fresh(), Squares(), replace(RECIPE, steps=1), tmp_path)
    tokenizer = letters_tokenizer()
    with pytest.raises(ArtifactError, match=r"checkpoint\.safetensors .* another run"):
        train_contrastive(new_backbone("tiny", tokenizer=tokenizer, text_width=64), Squares(), RECIPE, tmp_path)
    file = tmp_path / "checkpoint.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"checkpoint\.safetensors is damaged"):
        train_contrastive(fresh(), Squares(), RECIPE, tmp_path)


def test_a_gradient_that_is_not_finite_ends_the_run(tmp_path):
    backbone = fresh()
    backbone.model.visual_projection.weight.data.fill_(float("nan"))
    with pytest.raises(ClipadaptError, match="gradient is nan at step 1"):
        train_contrastive(backbone, Squares(), RECIPE, tmp_path)
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_attention_dropout_is_refused(tmp_path):
    backbone = fresh()
    backbone.model.config.text_config.attention_dropout = 0.1
    with pytest.raises(ClipadaptError, match="attention_dropout must be 0"):
        train_contrastive(backbone, Squares(), RECIPE, tmp_path)
