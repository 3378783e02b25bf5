from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from clipadapt.losses.contrastive import contrast, info_nce
from tests.processes import FORKED

PAIRS, DIM = 8, 5
GROUPS = torch.tensor([0, 1, 0, 2, 3, 1, 0, 4])  # of which some are in both halves


def features() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(PAIRS, DIM, generator=generator, requires_grad=True) for _ in range(2))
    return image, text, torch.tensor([2.0], requires_grad=True)


def loss_of(image: torch.Tensor, text: torch.Tensor, log_scale: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
    return info_nce(F.normalize(image, dim=-1), F.normalize(text, dim=-1), log_scale.exp(), **more)


def test_equals_the_definition():
    image, text, log_scale = features()
    similarity = log_scale.exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T  # (B, B)
    to_text = -torch.log_softmax(similarity, dim=1).diagonal().mean()
    to_image = -torch.log_softmax(similarity, dim=0).diagonal().mean()
    assert loss_of(image, text, log_scale).item() == pytest.approx(((to_text + to_image) / 2).item(), rel=1e-6)


def test_is_nearly_zero_for_matched_orthogonal_pairs_and_log_b_for_equal_ones():
    matched = torch.eye(PAIRS)
    assert info_nce(matched, matched, 100.0).item() < 1e-6
    equal = torch.ones(PAIRS, 1)
    assert info_nce(equal, equal, 100.0).item() == pytest.approx(torch.tensor(float(PAIRS)).log().item(), rel=1e-5)


def test_is_symmetric_in_the_two_sides():
    image, text, log_scale = features()
    assert loss_of(image, text, log_scale).item() == pytest.approx(loss_of(text, image, log_scale).item(), rel=1e-6)


def test_half_precision_features_are_compared_in_single():
    image = F.normalize(torch.randn(PAIRS, DIM, generator=torch.Generator().manual_seed(1)), dim=-1).bfloat16()
    assert info_nce(image, image, 100.0).dtype == torch.float32
    assert info_nce(image, image, 100.0).item() == info_nce(image.float(), image.float(), 100.0).item()


# Groups and negatives


def test_equal_captions_are_no_negatives():
    image, text, log_scale = features()
    groups = torch.tensor([0, 1, 0, 2, 3, 1, 0, 4])
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    losses = []
    for one, other in ((image, text), (text, image)):
        for i in range(PAIRS):
            seen = [j for j in range(PAIRS) if j == i or groups[j] != groups[i]]
            logits = log_scale.exp() * one[i] @ other[seen].T
            losses.append(torch.logsumexp(logits, 0) - logits[seen.index(i)])
    expected = torch.stack(losses).mean().item()
    assert info_nce(image, text, log_scale.exp(), groups=groups).item() == pytest.approx(expected, rel=1e-6)
    alone = info_nce(image, text, log_scale.exp(), groups=torch.arange(PAIRS))
    assert alone.item() == info_nce(image, text, log_scale.exp()).item()
    together = info_nce(image, text, log_scale.exp(), groups=torch.zeros(PAIRS))
    assert together.item() == 0


def test_wrong_texts_are_more_for_images_to_choose_from():
    image, text, log_scale = (tensor.detach() for tensor in features())
    image, text, scale = F.normalize(image, dim=-1), F.normalize(text, dim=-1), log_scale.exp()
    wrong = F.normalize(torch.randn(PAIRS, 2, DIM, generator=torch.Generator().manual_seed(1)), dim=-1)
    to_texts = scale * image @ torch.cat([text, wrong.reshape(-1, DIM)]).T
    expected = (
        F.cross_entropy(to_texts, torch.arange(PAIRS)) + F.cross_entropy(scale * text @ image.T, torch.arange(PAIRS))
    ) / 2
    assert info_nce(image, text, scale, negatives=wrong).item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_objective_takes_named_outputs():
    image, text, log_scale = features()
    out = {"image": F.normalize(image, dim=-1), "text": F.normalize(text, dim=-1), "scale": log_scale.exp()}
    assert contrast(out).item() == loss_of(image, text, log_scale).item()
    groups = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    expected = info_nce(*out.values(), groups=groups)
    assert contrast(out | {"groups": groups, "labels": groups}).item() == expected.item()
    several = contrast(out | {"text": torch.stack([out["text"], out["text"].flip(0)], dim=1)})
    flipped = info_nce(out["image"], out["text"].flip(0), out["scale"])
    assert several.item() == pytest.approx((contrast(out) + flipped).item() / 2, rel=1e-6)


# Several processes


def one_of_two(rank: int, folder: Path, hard: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    image, text, log_scale = features()
    half = slice(rank * PAIRS // 2, (rank + 1) * PAIRS // 2)
    more = {"groups": GROUPS[half], "negatives": text[half, None].flip(2)} if hard else {}
    loss = loss_of(image[half], text[half], log_scale, **more)
    loss.backward()
    results = [loss.detach(), image.grad, text.grad, log_scale.grad]
    for result in results:  # the mean over processes, as DistributedDataParallel takes it
        dist.all_reduce(result)
        result /= 2
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("hard", [False, True])
def test_two_processes_equal_one(tmp_path, hard):
    processes = [FORKED.Process(target=one_of_two, args=(rank, tmp_path, hard)) for rank in range(2)]
    for process in processes:
        process.start()
    image, text, log_scale = features()
    loss = loss_of(image, text, log_scale, **({"groups": GROUPS, "negatives": text[:, None].flip(2)} if hard else {}))
    loss.backward()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    together = torch.load(tmp_path / "results.pt", weights_only=True)
    for ours, whole in zip(together, [loss.detach(), image.grad, text.grad, log_scale.grad], strict=True):
        assert (ours - whole).norm() <= 1e-5 * whole.norm()
