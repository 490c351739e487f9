"""Latents of noise on disk, in the ordinary format, so that the real loader feeds the measured steps."""

from pathlib import Path

import numpy as np

from vidworld.contract import ActionContract, Statistics
from vidworld.data.manifest import Manifest, Sample, Shard
from vidworld.data.shards import ShardDataset, ShardWriter, json_bytes, latents_member, npy_bytes
from vidworld.lab.planar import EMBODIMENT
from vidworld.model.inputs import FrameShape

STRIDE = 8


def write_latents(
    folder: Path, *, channels: int, side: int, episodes: int, frames: int, tokenizer: str = "noise"
) -> ShardDataset:
    """A dataset of `episodes` episodes of one view; `tokenizer` is the digest of what could read them."""
    rng = np.random.default_rng(0)
    contract = contract_of()
    (folder / "shards").mkdir(parents=True)
    shards = []
    for split, count in (("train", episodes), ("val", 1)):
        samples, name = [], f"shards/{split}-000000.tar"
        with ShardWriter(folder / name) as writer:
            for number in range(count):
                key = f"{split}-{number:04d}"
                latents_TChw = rng.standard_normal((frames, channels, side, side)).astype(np.float16)
                writer.add(
                    key,
                    {
                        latents_member("top"): npy_bytes(latents_TChw),
                        "actions.npy": npy_bytes(_uniform(rng, frames, len(contract.action))),
                        "proprio.npy": npy_bytes(_uniform(rng, frames, len(contract.proprio))),
                        "timestamps.npy": npy_bytes(np.arange(frames) / 10),
                        "meta.json": json_bytes(
                            {"embodiment": contract.embodiment, "fps": 10, "frames": frames}
                        ),
                    },
                )
                samples.append(Sample(key, frames, contract.embodiment, key))
        shards.append(Shard(name, writer.sha256, writer.bytes, split, tuple(samples)))
    made_by = {"digest": tokenizer, "channels": channels, "spatial_stride": STRIDE, "time_stride": 1}
    Manifest(
        "latents",
        "noise",
        10.0,
        side * STRIDE,
        side * STRIDE,
        ("top",),
        (contract,),
        tuple(shards),
        tokenizer=made_by,
    ).write(folder)
    return ShardDataset.open(folder)


def contract_of() -> ActionContract:
    """The planar arm's, with statistics of uniform numbers."""
    rng = np.random.default_rng(0)
    sizes = len(EMBODIMENT.action), len(EMBODIMENT.proprio)
    action, proprio = (Statistics.of(_uniform(rng, 100, size)) for size in sizes)
    return ActionContract(
        EMBODIMENT.embodiment, EMBODIMENT.rate_hz, EMBODIMENT.action, EMBODIMENT.proprio, action, proprio
    )


def frame_shape(channels: int, side: int) -> FrameShape:
    """What the model sees of these data."""
    return FrameShape.from_contracts([contract_of()], views=1, channels=channels, height=side, width=side)


def _uniform(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return rng.uniform(-1, 1, (rows, columns)).astype(np.float32)
