"""Batches arrive as they were sent, also while the accelerator is busy with the step before."""

import pytest
import torch

from vidworld.trainer.transfer import Transfer
from vidworld.types import Batch


def batch(value: float, size: int = 8) -> Batch:
    latents = torch.full((2, 3, 1, 4, size, size), value, dtype=torch.float16)
    return Batch(
        ids=("a@0", "b@0"),
        actions_BTA=torch.full((2, 3, 5), value),
        proprio_BTS=torch.full((2, 3, 7), value),
        embodiment_B=torch.zeros(2, dtype=torch.int64),
        latents_BTVChw=latents,
    )


def test_on_a_cpu_batches_pass_through() -> None:
    sent = [batch(1.0), batch(2.0)]
    arrived = Transfer(torch.device("cpu"))(sent)
    assert [one.ids for one in arrived] == [one.ids for one in sent]
    for one, other in zip(sent, arrived, strict=True):
        assert torch.equal(one.latents_BTVChw, other.latents_BTVChw)
        assert other.video_BTVCHW is None


@pytest.mark.gpu
def test_on_a_gpu_a_busy_stream_sees_whole_batches_and_keeps_them() -> None:
    """Every step is slow and its batch is dropped at once: memory that came free too early would show."""
    device = torch.device("cuda")
    transfer, work = Transfer(device), torch.randn(4096, 4096, device=device)
    found = []
    for number in range(40):
        pinned = batch(float(number), size=256)._map(lambda tensor: tensor.pin_memory(), ("a@0", "b@0"))
        (arrived,) = transfer([pinned])
        for _ in range(4):
            work = torch.mm(work, work).div_(work.norm() + 1e-6)
        latents = arrived.latents_BTVChw.float()
        found.append(torch.stack([latents.min(), latents.max(), arrived.actions_BTA.sum() / 30]))
        del arrived, latents
    expected = torch.arange(40.0)[:, None].expand(40, 3)
    torch.testing.assert_close(torch.stack(found).cpu(), expected)
