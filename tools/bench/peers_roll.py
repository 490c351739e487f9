"""The contenders of `peers.py` at work: an untrained peer, and rollouts of ours and of trained peers."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from baselines import edm_unet, plain_dit
from peers_data import Case
from peers_measure import measured, normalised, pixels
from safetensors.torch import load_file
from torch import nn

from vidworld.errors import ConfigError
from vidworld.world.codec import to_video
from vidworld.world.engine import RolloutEngine
from vidworld.world.world import WorldModel

if TYPE_CHECKING:
    from peers import Bench


def make_peer(who: str, world: WorldModel, parameters: int) -> nn.Module:
    """An untrained peer of about so many parameters."""
    shape, model = world.spec.shape, world.spec.model
    match who:
        case "edm":
            return edm_unet.EdmUNet(edm_unet.matched(edm_unet.EdmConfig(shape.action_dims), parameters))
        case "plain":
            config = plain_dit.PlainConfig(
                shape.action_dims,
                channels=shape.channels,
                side=shape.height,
                width=max(64, model.width // 64 * 64),
                patch=model.patch_size,
                window=world.spec.sampler.window,
            )
            return plain_dit.PlainDiT(plain_dit.matched(config, parameters))
    raise ConfigError("--contenders", got=who, expected="plain or edm")


def compiled(net: nn.Module, bench: "Bench", **how: Any) -> None:
    """Compile in place where that is asked for and works."""
    if bench.options.compile and bench.gpu:
        net.compile(dynamic=False, **how)


def measure_ours(
    bench: "Bench", world: WorldModel, cases: Sequence[Case]
) -> dict[str, dict[str, tuple[float, str]]]:
    """Quality and speed of our world at each number of steps."""
    found = {}
    for steps in bench.options.our_steps:
        engine = RolloutEngine(
            world,
            sampler=replace(world.spec.sampler, steps=steps),
            compile=bench.options.compile and bench.gpu,
        )

        def roll(
            some: Sequence[Case], actions: Sequence[np.ndarray], engine: RolloutEngine = engine
        ) -> np.ndarray:
            state = world.reset(
                [case.prompt for case in some],
                seed=bench.options.seed,
                sampler=engine.sampler,
                allow_out_of_range=True,
            )
            video = engine.rollout(state, np.stack(actions), allow_out_of_range=True).video_BTVHWC
            assert video is not None
            return video[:, :, 0].cpu().numpy()

        found[f"ours.k{steps}"] = measured(bench, f"ours.k{steps}", roll, cases)
    return found


def measure_peer(
    bench: "Bench", who: str, world: WorldModel, parameters: int, cases: Sequence[Case]
) -> dict[str, dict[str, tuple[float, str]]]:
    """Quality and speed of a trained peer."""
    options = bench.options
    if not (options.work / f"{who}.json").is_file():
        return {}
    net: Any = make_peer(who, world, parameters)
    net.load_state_dict(load_file(options.work / f"{who}.safetensors"))
    one = net.to(options.device).eval()
    many = copy.deepcopy(one)
    # A CUDA graph saves launches where one row leaves the GPU idle; with many, it would copy a large cache.
    compiled(one, bench, mode="reduce-overhead")
    compiled(many, bench)

    def roll(some: Sequence[Case], actions: Sequence[np.ndarray]) -> np.ndarray:
        net = one if len(some) == 1 else many
        generator = torch.Generator(options.device).manual_seed(options.seed)
        known_BTVHWC = torch.from_numpy(np.stack([case.prompt.frames for case in some])).to(options.device)
        between = normalised(world, [case.prompt_actions for case in some])
        future = normalised(world, actions)
        with torch.no_grad(), bench.half():
            if who == "edm":
                known = known_BTVHWC[:, :, 0].movedim(-1, 2).float() / 127.5 - 1
                return pixels(net.rollout(known, between, future, generator))
            latents = world.encode(known_BTVHWC)[:, :, 0]
            imagined = net.rollout(latents, between, future, generator)
        return to_video(world.decode(imagined[:, :, None].to(world.dtype)))[:, :, 0].cpu().numpy()

    return {who: measured(bench, who, roll, cases)}
