"""The noise of a sample: published vectors, the same bits at any batch size or order, normal, independent."""

import math

import numpy as np
import pytest
import torch

from vidworld.model.inputs import FrameShape
from vidworld.world import noise
from vidworld.world.noise import (
    CONTEXT,
    MASK,
    START,
    NoiseStream,
    Purpose,
    Request,
    fork_ids,
    normals,
    philox,
)

SHAPE = (2, 16, 6, 7)


def normal(seed, ids, frame, purpose, shape, **options):
    return normals(seed, ids, [Request(frame, purpose, shape)], **options)[0]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_published_vectors(counter, key, expected):
    got = philox([torch.tensor([word]) for word in counter], key)
    assert tuple(int(word) for word in got) == expected


def test_logarithm_sine_and_cosine_match_numpy():
    uniform = torch.from_numpy(np.random.default_rng(0).random(20000))
    uniform = torch.cat([uniform, torch.tensor([2.0**-33, 1 - 2.0**-33, 0.5, math.sqrt(0.5)]).double()])
    np.testing.assert_allclose(noise._log(uniform).numpy(), np.log(uniform.numpy()), rtol=1e-14)
    angle = uniform * math.pi / 2
    squared = angle * angle
    np.testing.assert_allclose(noise._horner(noise._COS_TERMS, squared), np.cos(angle.numpy()), atol=1e-12)
    np.testing.assert_allclose(angle * noise._horner(noise._SIN_TERMS, squared), np.sin(angle), atol=1e-12)


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_same_bits_at_any_batch_size_and_order(batch):
    ids = torch.tensor([5, 0, 2**40 + 7, 3, 11, 2, 2**33, 9])
    everyone = normal(7, ids, 4, Purpose.LATENTS, SHAPE)
    order = torch.tensor([6, 1, 7, 2, 0, 5, 3, 4])
    assert torch.equal(normal(7, ids[order], 4, Purpose.LATENTS, SHAPE), everyone[order])
    for rows in torch.arange(8).split(batch):
        assert torch.equal(normal(7, ids[rows], 4, Purpose.LATENTS, SHAPE), everyone[rows])


def test_an_element_does_not_depend_on_the_shape_around_it():
    ids = torch.arange(3)
    small, large = (normal(1, ids, 0, Purpose.PROPRIO, (size,)) for size in (7, 1001))
    assert torch.equal(small, large[:, :7])


def test_nor_on_what_else_is_asked_for():
    ids = torch.tensor([3, 2**40])
    requests = [
        Request(5, Purpose.LATENTS, (3, 7)),
        Request(0, Purpose.MODEL, ()),
        Request(9, Purpose.FORK, (2,)),
    ]
    for request, drawn in zip(requests, normals(1, ids, requests), strict=True):
        assert torch.equal(drawn, normal(1, ids, *request))
        assert drawn.shape == (2, *request.shape)
    shape = FrameShape(2, 3, 4, 5, 6, 7)
    start, context = NoiseStream(1, ids).frames(shape, [4, 8], START, CONTEXT)
    assert torch.equal(start.latents_BTVChw[:, 1], normal(1, ids, 8, Purpose.LATENTS, (2, 3, 4, 5)))
    assert torch.equal(context.proprio_BTS[:, 0], normal(1, ids, 4, Purpose.CONTEXT_PROPRIO, (6,)))


def test_every_part_of_the_stream_name_changes_the_noise():
    reference = normal(1, torch.tensor([0]), 0, Purpose.LATENTS, (64,))
    others = [
        normal(2, torch.tensor([0]), 0, Purpose.LATENTS, (64,)),
        normal(1 + 2**32, torch.tensor([0]), 0, Purpose.LATENTS, (64,)),
        normal(1, torch.tensor([1]), 0, Purpose.LATENTS, (64,)),
        normal(1, torch.tensor([2**32]), 0, Purpose.LATENTS, (64,)),
        normal(1, torch.tensor([0]), 1, Purpose.LATENTS, (64,)),
        *(normal(1, torch.tensor([0]), 0, purpose, (64,)) for purpose in Purpose if purpose),
    ]
    for other in others:
        assert not torch.isclose(reference, other).any()
    assert len({tuple(other.flatten().tolist()) for other in others}) == len(others)


def test_noise_is_standard_normal():
    samples = normal(3, torch.arange(64), 0, Purpose.LATENTS, (4096,), dtype=torch.float64).flatten().numpy()
    n = len(samples)
    # Six standard errors of each moment of a true normal.
    assert abs(samples.mean()) < 6 / math.sqrt(n)
    assert abs(samples.var() - 1) < 6 * math.sqrt(2 / n)
    assert abs((samples**3).mean()) < 6 * math.sqrt(15 / n)
    assert abs((samples**4).mean() - 3) < 6 * math.sqrt(96 / n)
    # Kolmogorov-Smirnov distance; 1.95 / sqrt(n) is its 0.1 % point.
    ordered = np.sort(samples)
    theory = 0.5 * (1 + torch.erf(torch.from_numpy(ordered) / math.sqrt(2)).numpy())
    steps = np.arange(n + 1) / n
    distance = max((steps[1:] - theory).max(), (theory - steps[:-1]).max())
    assert distance < 1.95 / math.sqrt(n)


def test_streams_and_neighbours_are_uncorrelated():
    ids = torch.arange(16)
    streams = [normal(3, ids, 0, purpose, (4096,)).flatten().numpy() for purpose in Purpose]
    streams.append(normal(3, ids, 1, Purpose.LATENTS, (4096,)).flatten().numpy())
    streams.append(normal(4, ids, 0, Purpose.LATENTS, (4096,)).flatten().numpy())
    streams.append(normal(3, ids + 16, 0, Purpose.LATENTS, (4096,)).flatten().numpy())
    streams += [np.roll(streams[0], shift) for shift in (1, 2, 3, 4096)]
    correlation = np.corrcoef(streams) - np.eye(len(streams))
    assert abs(correlation).max() < 6 / math.sqrt(len(streams[0]))
    # Negative control: the bound does see one part in ten of shared noise.
    assert np.corrcoef(streams[0], streams[1] + 0.1 * streams[0])[0, 1] > 6 / math.sqrt(len(streams[0]))


def test_fork_ids_depend_on_parent_and_copy_alone():
    parents, copies = torch.tensor([4, 9, 4, 4]), torch.tensor([0, 1, 1, 2])
    ids = fork_ids(0, parents, 12, copies)
    assert ids[0] == 4
    assert len(set(ids.tolist())) == 4
    assert bool((ids >= 0).all())
    assert bool((ids < noise.MAX_SAMPLE_ID).all())
    assert torch.equal(fork_ids(0, parents[1:2], 12, copies[1:2]), ids[1:2])
    assert not torch.equal(fork_ids(0, parents[1:2], 13, copies[1:2]), ids[1:2])


@pytest.mark.gpu
def test_cpu_and_gpu_agree_to_the_bit():
    ids = torch.arange(256)
    host = normal(7, ids, 3, Purpose.LATENTS, (4099,))
    assert torch.equal(normal(7, ids.cuda(), 3, Purpose.LATENTS, (4099,)).cpu(), host)
