"""Members that share a network, trained as any world and loaded as an ensemble."""

from pathlib import Path
from types import SimpleNamespace

import torch

import vidworld
from vidworld import cli
from vidworld.data.shards import ShardDataset
from vidworld.evaluation.grounding import ground_episode
from vidworld.model.config import DiTConfig
from vidworld.model.dit import CausalDiT
from vidworld.model.inputs import FrameShape
from vidworld.model.normalizer import Normalizer
from vidworld.quantize import MEMBER_CHANGES
from vidworld.trainer.tasks import WorldTask
from vidworld.trainer.train import train
from vidworld.world.build import merged
from vidworld.world.ensemble import Ensemble
from vidworld.world.load import open_world

MODEL = {"width": 32, "depth": 2, "num_heads": 2, "num_kv_heads": 1, "time_every": 2, "num_registers": 1}


def test_members_of_one_run_are_trained_loaded_and_packed(
    planar: Path, latents: Path, tokenizer_run: Path, settings: SimpleNamespace, tmp_path: Path, capsys
) -> None:
    run, start = tmp_path / "run", tmp_path / "start"
    train(settings.world(planar, tokenizer_run, latents=latents, model=MODEL), start, progress_bar=False)
    shared = MODEL | {"members": 3, "member_rank": 2}
    training = settings.world(planar, tokenizer_run, latents=latents, model=shared, init=start)
    train(training, run, progress_bar=False)

    ensemble = vidworld.load(run, "cpu", members="all")
    assert isinstance(ensemble, Ensemble)
    assert ensemble.num_members == 3
    raw = open_world(run).model
    # All of them learnt, and each something else: clips of a batch are theirs in turn.
    fresh = {name: one for name, one in raw.state_dict().items() if name.endswith("out_JOr")}
    for one in fresh.values():
        assert float((one[0] - one[1]).abs().max()) > 1e-3
    dataset = ShardDataset.open(planar)
    key = dataset.manifest.samples("val")[0].key
    grounding = ground_episode(dataset, key, ensemble.spec, context=2, frames=3)
    assert grounding.recording is not None
    with torch.no_grad():
        state = ensemble.reset(grounding.prompt, num_samples=2, allow_out_of_range=True)
        rolled = ensemble.rollout(state, grounding.recording.actions_TA, allow_out_of_range=True)
    assert rolled.latents_BTVChw.shape[0] == 6
    assert bool(rolled.latents_BTVChw.isfinite().all())
    assert not torch.equal(rolled.latents_BTVChw[0], rolled.latents_BTVChw[2])
    # Packed, it is the trunk and its small changes, and the same ensemble.
    assert cli.run(["export", str(run), "--out", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    packed = vidworld.load(tmp_path / "out", "cpu", members="all")
    with torch.no_grad():
        again = packed.rollout(state, grounding.recording.actions_TA, allow_out_of_range=True)
    assert torch.equal(again.latents_BTVChw, rolled.latents_BTVChw)
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size < 2 * sum(4 * parameter.numel() for parameter in ensemble.networks[0].parameters())


def test_members_begin_from_packed_weights_and_learn_the_spread(
    planar: Path, tokenizer_run: Path, settings: SimpleNamespace, tmp_path: Path, capsys
) -> None:
    """A shipped world of rounded weights becomes the trunk; the energy score trains trunk and members."""
    plain = MODEL | {"noise_dims": 4}
    train(settings.world(planar, tokenizer_run, model=plain), tmp_path / "start", progress_bar=False)
    words = ["export", str(tmp_path / "start"), "--out", str(tmp_path / "packed"), "--precision", "int8"]
    assert cli.run(words) == 0, capsys.readouterr().err
    shared = plain | {"members": 3, "member_rank": 2}
    rows = {"objective": {"kind": "energy"}, "sampler": {"steps": 1}, "loop": {"steps": 4, "log_every": 2}}
    tokenizer = tmp_path / "packed" / "tokenizer"  # rounded as well, and what it knows the world by
    first = settings.world(
        planar, tokenizer, model=shared, init=tmp_path / "packed", optim={"lr": 0.0, "muon_lr": 0.0}, **rows
    )
    train(first, tmp_path / "still", progress_bar=False)
    packed, still = (open_world(tmp_path / name).model.state_dict() for name in ("packed", "still"))
    for name, weight in packed.items():
        assert torch.equal(still[name], weight), "the trunk is what was packed"
    second = settings.world(planar, tokenizer, model=shared, init=tmp_path / "still", **rows)
    train(second, tmp_path / "learnt", progress_bar=False)
    learnt = open_world(tmp_path / "learnt").model.state_dict()
    for name in (name for name in learnt if name.endswith(MEMBER_CHANGES)):
        moved = (learnt[name] - still[name]).flatten(1).abs().amax(1)
        assert bool((moved > 0).all()), f"{name}: each member learnt, from where it was"
        assert float(moved.max()) < 0.1 * float(still[name].abs().max()), "and was not drawn anew"


def test_a_run_without_members_begins_from_the_first_of_an_ensemble(
    planar: Path, tokenizer_run: Path, settings: SimpleNamespace, tmp_path: Path, capsys
) -> None:
    shared = MODEL | {"members": 2, "member_rank": 2}
    train(settings.world(planar, tokenizer_run, model=shared), tmp_path / "both", progress_bar=False)
    still = {"optim": {"lr": 0.0, "muon_lr": 0.0, "weight_decay": 0.0}}
    alone = settings.world(planar, tokenizer_run, model=MODEL, init=tmp_path / "both", **still)
    train(alone, tmp_path / "alone", progress_bar=False)
    words = ["export", str(tmp_path / "both"), "--member", "0", "--out", str(tmp_path / "first")]
    assert cli.run(words) == 0, capsys.readouterr().err
    begun, first = (open_world(tmp_path / name).model.state_dict() for name in ("alone", "first"))
    second = merged(open_world(tmp_path / "both"), 1).model.state_dict()
    assert begun.keys() == first.keys()
    for name, weight in first.items():
        torch.testing.assert_close(begun[name], weight, rtol=0, atol=1e-6)
    assert any(float((second[name] - weight).abs().max()) > 1e-3 for name, weight in first.items())


def test_clips_are_the_members_in_turn(settings: SimpleNamespace, planar: Path, tokenizer_run: Path) -> None:
    contract = ShardDataset.open(planar).manifest.contracts
    shape = FrameShape.from_contracts(contract, views=1, channels=4, height=4, width=4)
    net = CausalDiT(DiTConfig(**MODEL, members=3), shape)
    task = WorldTask(net, Normalizer(contract), settings.world(planar, tokenizer_run).objective)
    found = task._members(torch.ones(7, 4))
    assert found is not None
    assert found.tolist() == [0, 1, 2, 0, 1, 2, 0]
    plain = WorldTask(CausalDiT(DiTConfig(**MODEL), shape), Normalizer(contract), task.objective)
    assert plain._members(torch.ones(7, 4)) is None
