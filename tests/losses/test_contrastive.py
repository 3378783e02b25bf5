import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from clipadapt.losses.contrastive import info_nce

PAIRS, DIM = 8, 5


def features() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(PAIRS, DIM, generator=generator, requires_grad=True) for _ in range(2))
    return image, text, torch.tensor([2.0], requires_grad=True)


def loss_of(image: torch.Tensor, text: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    return info_nce(F.normalize(image, dim=-1), F.normalize(text, dim=-1), log_scale.exp())


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


def one_of_two(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    image, text, log_scale = features()
    half = slice(rank * PAIRS // 2, (rank + 1) * PAIRS // 2)
    loss = loss_of(image[half], text[half], log_scale)
    loss.backward()
    results = [loss.detach(), image.grad, text.grad, log_scale.grad]
    for result in results:  # the mean over processes, as DistributedDataParallel takes it
        dist.all_reduce(result)
        result /= 2
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=one_of_two, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    image, text, log_scale = features()
    loss = loss_of(image, text, log_scale)
    loss.backward()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    together = torch.load(tmp_path / "results.pt", weights_only=True)
    for ours, whole in zip(together, [loss.detach(), image.grad, text.grad, log_scale.grad], strict=True):
        assert (ours - whole).norm() <= 1e-5 * whole.norm()
