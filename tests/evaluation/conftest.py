"""A small planar dataset and a run of an untrained world on it."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vidworld.data.convert import ConvertOptions, convert
from vidworld.data.shards import ShardDataset
from vidworld.lab.planar import PlanarConfig, PlanarSource
from vidworld.model.config import DiTConfig
from vidworld.model.inputs import FrameShape
from vidworld.tokenizers.conv import ConvTokenizer, ConvTokenizerConfig
from vidworld.tokenizers.store import copy_tokenizer, load_tokenizer, save_tokenizer
from vidworld.world.build import build
from vidworld.world.spec import SamplerConfig, WorldSpec

SIZE = 32


@pytest.fixture(scope="session")
def planar_data(tmp_path_factory) -> Path:
    """Five episodes of 20 frames of 32x32, one of them held out."""
    out = tmp_path_factory.mktemp("planar") / "data"
    source = PlanarSource(5, config=PlanarConfig(frames=20, size=SIZE))
    convert(source, ConvertOptions(out=out, size=f"{SIZE}x{SIZE}", workers=1))
    return out


@pytest.fixture(scope="session")
def untrained_run(planar_data, tmp_path_factory) -> Path:
    """A run directory with one checkpoint of random weights."""
    run = tmp_path_factory.mktemp("run")
    manifest = ShardDataset.open(planar_data).manifest
    torch.manual_seed(0)
    tokenizer = ConvTokenizer(
        ConvTokenizerConfig(latent_channels=4, widths=(16, 16, 16), encoder_blocks=(0, 1, 1), norm_groups=4)
    )
    spec = WorldSpec(
        model=DiTConfig(width=32, depth=2, num_heads=2, num_kv_heads=1, time_every=2, num_registers=1),
        shape=FrameShape.from_contracts(
            manifest.contracts, views=1, channels=4, height=SIZE // 8, width=SIZE // 8
        ),
        views=manifest.views,
        height=SIZE,
        width=SIZE,
        fps=manifest.fps,
        contracts=manifest.contracts,
        sampler=SamplerConfig(steps=2, window=8),
        tokenizer_digest=tokenizer.digest,
        dataset_digest=manifest.digest,
    )
    world = build(spec, tokenizer)
    for parameter in world.model.parameters():
        torch.nn.init.normal_(parameter, std=max(parameter.shape[-1], 16) ** -0.5)
    spec.write(run)
    save_tokenizer(tokenizer, run / "tokenizer")
    checkpoint = run / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    save_file(world.model.state_dict(), checkpoint / "ema.safetensors")
    (run / "checkpoints" / "latest").write_text(checkpoint.name)
    return run


@pytest.fixture(scope="session")
def shared_run(untrained_run, tmp_path_factory) -> Path:
    """A run of three members that share a network, with one checkpoint of random weights."""
    run = tmp_path_factory.mktemp("shared")
    spec = WorldSpec.read(untrained_run)
    spec = dataclasses.replace(spec, model=dataclasses.replace(spec.model, members=3, member_rank=4))
    torch.manual_seed(1)
    world = build(spec, load_tokenizer(untrained_run / "tokenizer"))
    for parameter in world.model.parameters():
        torch.nn.init.normal_(parameter, std=max(parameter.shape[-1], 16) ** -0.5)
    spec.write(run)
    copy_tokenizer(untrained_run / "tokenizer", run / "tokenizer", with_weights=True)
    checkpoint = run / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    save_file(world.model.state_dict(), checkpoint / "ema.safetensors")
    (run / "checkpoints" / "latest").write_text(checkpoint.name)
    return run
