"""Worlds over a tokenizer that compresses time by 4: chunks of actions, streamed pictures, forks, files."""

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vidworld.contract import ActionContract
from vidworld.errors import ConfigError, ContractError, DataError
from vidworld.model.config import DiTConfig
from vidworld.model.inputs import FrameShape
from vidworld.tokenizers.pretrained import wrap
from vidworld.world.build import build
from vidworld.world.prompt import Prompt
from vidworld.world.spec import SamplerConfig, WorldSpec
from vidworld.world.state import WorldState
from vidworld.world.world import WorldModel, to_video

K, HEIGHT, WIDTH = 4, 16, 32
VIEWS = ("top", "wrist")
WAN: dict[str, Any] = {
    "base_dim": 4,
    "z_dim": 4,
    "dim_mult": [1, 1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "latents_mean": [0.0] * 4,
    "latents_std": [1.0] * 4,
}
COSMOS: dict[str, Any] = {
    "latent_channels": 4,
    "encoder_block_out_channels": (8, 8, 8, 8),
    "decode_block_out_channels": (8, 8, 8, 8),
    "attention_resolutions": (8,),
    "resolution": 64,
    "num_layers": 1,
    "temporal_compression_ratio": 4,
    "latents_mean": [0.0] * 4,
    "latents_std": [1.0] * 4,
}


def make_world(contract: ActionContract, cls: str, config: dict[str, Any]) -> WorldModel:
    import diffusers

    torch.manual_seed(0)
    vae = getattr(diffusers, cls)(**config)
    for parameter in vae.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 16
        torch.nn.init.normal_(parameter, std=max(fan_in, 4) ** -0.5)
    tokenizer = wrap(vae, cls, vae.config)
    shape = FrameShape.from_contracts(
        (contract,),
        views=len(VIEWS),
        channels=4,
        height=HEIGHT // 8,
        width=WIDTH // 8,
        actions_per_frame=K,
    )
    spec = WorldSpec(
        model=DiTConfig(width=32, depth=2, num_heads=2, num_kv_heads=1, time_every=2, num_registers=1),
        shape=shape,
        views=VIEWS,
        height=HEIGHT,
        width=WIDTH,
        fps=10.0,
        contracts=(contract,),
        sampler=SamplerConfig(steps=2, window=4),
        tokenizer_digest=tokenizer.digest,
    )
    world = build(spec, tokenizer)
    for parameter in world.model.parameters():
        torch.nn.init.normal_(parameter, std=max(parameter.shape[-1], 16) ** -0.5)
    return world.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def world(contract: Callable[..., ActionContract]) -> WorldModel:
    return make_world(contract("arm", 3, 4), "AutoencoderKLWan", WAN)


@pytest.fixture(scope="module")
def unstreamed(contract: Callable[..., ActionContract]) -> WorldModel:
    return make_world(contract("arm", 3, 4), "AutoencoderKLCosmos", COSMOS)


def make_frames(count: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (count, len(VIEWS), HEIGHT, WIDTH, 3), dtype=np.uint8)


def make_prompt(frames: int = 5, seed: int = 0) -> Prompt:
    generator = np.random.default_rng(seed)
    return Prompt(
        make_frames(frames, seed),
        generator.uniform(-1, 3, (frames, 4)).astype(np.float32),
        make_actions(frames - 1, seed),
    )


def make_actions(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(50 + seed).uniform(-1, 1, (count, 3)).astype(np.float32)


def latents_so_far(world: WorldModel, prompt: Prompt, imagined: torch.Tensor) -> torch.Tensor:
    first = world.encode(torch.tensor(prompt.frames)[None])
    return torch.cat([first.expand(len(imagined), *first.shape[1:]), imagined], 1)


@torch.no_grad()
def test_a_rollout_shows_what_one_decode_of_everything_shows(world: WorldModel) -> None:
    """Bit for bit: streaming is not a window."""
    prompt, actions = make_prompt(9), make_actions(5 * K)
    state = world.reset(prompt, num_samples=2, seed=3)
    rollout = world.rollout(state, actions)
    assert rollout.video_BTVHWC is not None
    assert rollout.video_BTVHWC.shape == (2, 5 * K, len(VIEWS), HEIGHT, WIDTH, 3)
    assert rollout.latents_BTVChw.shape[1] == rollout.proprio_BTS.shape[1] == 5
    everything = latents_so_far(world, prompt, rollout.latents_BTVChw)
    whole = to_video(world.decode(everything))
    assert torch.equal(rollout.video_BTVHWC, whole[:, 9:])
    # Without the prompt the same latents show something else.
    alone = to_video(world.decode(rollout.latents_BTVChw))
    assert not torch.equal(rollout.video_BTVHWC[:, -1], alone[:, -1])


@torch.no_grad()
def test_steps_are_the_rollout(world: WorldModel) -> None:
    prompt, actions = make_prompt(), make_actions(4 * K)
    start = world.reset(prompt, num_samples=2, seed=3)
    rollout = world.rollout(start, actions)
    assert rollout.video_BTVHWC is not None
    state, clips = start, []
    for chunk in actions.reshape(4, K, 3):
        state, seen = world.step(state, chunk)
        assert seen.clip_BkVHWC is not None
        assert seen.video_BVHWC is not None
        assert torch.equal(seen.video_BVHWC, seen.clip_BkVHWC[:, -1])
        assert seen.proprio_BS.shape == (2, 4)
        again = world.observation(state)
        assert again.clip_BkVHWC is not None
        assert torch.equal(again.clip_BkVHWC, seen.clip_BkVHWC)
        clips.append(seen.clip_BkVHWC)
    assert torch.equal(torch.cat(clips, 1), rollout.video_BTVHWC)
    assert torch.equal(state.newest.latents_BTVChw, rollout.state.newest.latents_BTVChw)
    # The state after a rollout goes on where it is.
    more = make_actions(K, seed=9)
    after, _ = world.step(state, more)
    assert torch.equal(
        world.observation(after).clip_BkVHWC,  # type: ignore[arg-type]
        world.step(rollout.state, more)[1].clip_BkVHWC,  # type: ignore[arg-type]
    )


@torch.no_grad()
@pytest.mark.parametrize("look_at", [(False, True, False, True), (False, False, False, True)])
def test_steps_that_nobody_looks_at_change_no_picture(world: WorldModel, look_at: tuple[bool, ...]) -> None:
    state = world.reset(make_prompt(), num_samples=2, seed=3)
    rollout = world.rollout(state, make_actions(4 * K))
    assert rollout.video_BTVHWC is not None
    for step, (chunk, look) in enumerate(zip(make_actions(4 * K).reshape(4, K, 3), look_at, strict=True)):
        state, seen = world.step(state, chunk, decode=look)
        assert (seen.clip_BkVHWC is not None) == look
        if seen.clip_BkVHWC is not None:
            expected = rollout.video_BTVHWC[:, step * K : (step + 1) * K]
            assert torch.equal(seen.clip_BkVHWC, expected)
    assert state.coding is not None
    assert state.coding.pending_BTVChw.shape[1] == 0


@torch.no_grad()
def test_an_action_chunk_changes_its_own_frames_and_later_ones_only(world: WorldModel) -> None:
    state, actions = world.reset(make_prompt(), seed=3), make_actions(4 * K)
    video = world.rollout(state, actions).video_BTVHWC
    assert video is not None
    for row in (2 * K, 2 * K + 1, 3 * K - 1):  # every action of the third chunk counts
        changed = actions.copy()
        changed[row] = 1.5
        other = world.rollout(state, changed).video_BTVHWC
        assert other is not None
        assert torch.equal(other[:, : 2 * K], video[:, : 2 * K])
        assert not torch.equal(other[:, 2 * K :], video[:, 2 * K :])
    order = actions.copy()
    order[2 * K : 3 * K] = order[2 * K : 3 * K][::-1]  # the order within a chunk counts
    other = world.rollout(state, order).video_BTVHWC
    assert other is not None
    assert not torch.equal(other[:, 2 * K :], video[:, 2 * K :])


@torch.no_grad()
def test_forked_selected_saved_states_go_on_alike(world: WorldModel, tmp_path: Path) -> None:
    state = world.reset([make_prompt(seed=1), make_prompt(seed=2)], seed=3)
    state, _ = world.step(state, make_actions(K))
    chunk = make_actions(K, seed=1)
    after, expected = world.step(state, chunk)
    assert expected.clip_BkVHWC is not None
    state.save(tmp_path / "state")
    loaded = WorldState.load(tmp_path / "state")
    for same in (loaded, state.detach(), state.to("cpu"), state.select([0, 1])):
        assert torch.equal(world.step(same, chunk)[1].clip_BkVHWC, expected.clip_BkVHWC)  # type: ignore[arg-type]
    swapped = world.step(state.select([1, 0, 1]), chunk)[1].clip_BkVHWC
    assert swapped is not None
    assert (swapped.int() - expected.clip_BkVHWC[[1, 0, 1]].int()).abs().max() <= 1  # another batch size
    assert not torch.equal(swapped[0], swapped[1])
    forked = world.fork(after, [0, 0])
    futures = world.step(forked, chunk)[1].clip_BkVHWC
    assert futures is not None
    assert not torch.equal(futures[0], futures[1])
    # The state that was forked is what it was.
    again = world.step(state, chunk)[1].clip_BkVHWC
    assert torch.equal(again, expected.clip_BkVHWC)  # type: ignore[arg-type]
    waiting, _ = world.step(state, chunk, decode=False)
    waiting.save(tmp_path / "waiting")
    shown = world.observation(WorldState.load(tmp_path / "waiting")).clip_BkVHWC
    assert torch.equal(shown, expected.clip_BkVHWC)  # type: ignore[arg-type]


@torch.no_grad()
def test_samples_of_a_prompt_share_the_memory_of_its_encoder(world: WorldModel) -> None:
    state = world.reset(make_prompt(), num_samples=5, seed=3)
    assert state.coding is not None
    assert state.coding.encoder is not None
    assert state.coding.encoder.batch == 5 * len(VIEWS)
    assert {len(feature) for feature in state.coding.encoder.features.values()} == {len(VIEWS)}
    frames = make_frames(K, seed=8)
    seen = world.observe(state, frames).newest.latents_BTVChw
    alone = world.observe(state.select([3]), frames).newest.latents_BTVChw
    torch.testing.assert_close(seen[3:4], alone, rtol=1e-3, atol=1e-4)
    assert not torch.equal(seen[:, :, 0], seen[:, :, 1])


@torch.no_grad()
def test_observed_frames_are_the_prompt_that_had_them(world: WorldModel) -> None:
    prompt = make_prompt(13)
    assert prompt.proprio is not None
    assert prompt.actions is not None
    state = world.reset(Prompt(prompt.frames[:5], prompt.proprio[:5], prompt.actions[:4]), seed=3)
    for start in (5, 9):
        state = world.observe(
            state,
            prompt.frames[start : start + K],
            proprio=prompt.proprio[start + K - 1],
            action=prompt.actions[start - 1 : start - 1 + K],
        )
    longer = world.reset(prompt, seed=3)
    assert torch.equal(state.newest.latents_BTVChw, longer.newest.latents_BTVChw)
    torch.testing.assert_close(state.newest.proprio_BTS, longer.newest.proprio_BTS)
    chunk = make_actions(K, seed=4)
    found, expected = world.step(state, chunk)[1], world.step(longer, chunk)[1]
    torch.testing.assert_close(found.latents_BVChw, expected.latents_BVChw, rtol=1e-3, atol=1e-4)
    again = world.observe(state, prompt.frames[:K][None])  # one sample given as a batch
    assert again.frame == state.frame + 1


@torch.no_grad()
def test_what_does_not_fit_a_step(world: WorldModel) -> None:
    state = world.reset(make_prompt(), seed=3)
    with pytest.raises(
        ContractError, match=r"got shape \(3,\), expected \[B, 4, A\] or \[4, A\]: a step is 4"
    ):
        world.step(state, make_actions(1)[0])
    with pytest.raises(ContractError, match=r"actions of a step: got shape \(3, 3\)"):
        world.step(state, make_actions(3))
    with pytest.raises(ContractError, match="number of actions: got 6, expected a multiple of 4"):
        world.rollout(state, make_actions(6))
    with pytest.raises(DataError, match=r"observed frames: got \(1, 3, 2, .*4 camera frames a step"):
        world.observe(state, make_frames(3))
    with pytest.raises(DataError, match=r"frames of the prompt: got 4, expected 1 \+ a multiple of 4"):
        world.reset(make_prompt(4))
    imagined, _ = world.step(state, make_actions(K))
    with pytest.raises(
        ConfigError, match=r"observe after imagined frames: .*observe a state before it imagi"
    ):
        world.observe(imagined, make_frames(K))


@torch.no_grad()
def test_a_tokenizer_that_cannot_stream_says_so_and_is_exact(unstreamed: WorldModel) -> None:
    prompt, actions = make_prompt(), make_actions(3 * K)
    state = unstreamed.reset(prompt, seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rollout = unstreamed.rollout(state, actions)
    assert rollout.video_BTVHWC is not None
    everything = latents_so_far(unstreamed, prompt, rollout.latents_BTVChw)
    whole = to_video(unstreamed.decode(everything))[:, 5:]
    assert torch.equal(rollout.video_BTVHWC, whole)
    clips = []
    for chunk in actions.reshape(3, K, 3):
        with pytest.warns(UserWarning, match=r"cannot stream: each step .*decode=False"):
            state, seen = unstreamed.step(state, chunk)
        assert seen.clip_BkVHWC is not None
        clips.append(seen.clip_BkVHWC)
    assert (torch.cat(clips, 1).int() - whole.int()).abs().max() <= 1  # decoded at other lengths
    with pytest.raises(ConfigError, match="observe with a tokenizer that cannot stream; use reset"):
        unstreamed.observe(state, make_frames(K))


def test_gradients_pass_through_chunks(world: WorldModel) -> None:
    actions = torch.tensor(make_actions(2 * K), requires_grad=True)
    rollout = world.rollout(world.reset(make_prompt(), seed=3), actions)
    rollout.latents_BTVChw[:, -1].square().sum().backward()
    assert actions.grad is not None
    assert (actions.grad != 0).any(1).all()
    assert rollout.state.coding is not None
    assert not rollout.state.coding.pending_BTVChw.requires_grad


def test_a_world_for_another_stride_is_refused(world: WorldModel) -> None:
    shape = dataclasses.replace(world.spec.shape, actions_per_frame=1)
    spec = dataclasses.replace(world.spec, shape=shape, tokenizer_digest="")
    with pytest.raises(Exception, match="time stride of the tokenizer: got 4, expected 1"):
        build(spec, world.tokenizer)
