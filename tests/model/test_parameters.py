import torch

from vidworld.model.config import DiTConfig
from vidworld.model.dit import CausalDiT
from vidworld.model.inputs import FrameShape
from vidworld.model.parameters import muon_parameters, parameter_groups


def test_every_parameter_is_in_one_group(make_model):
    model = make_model(noise_dims=3)
    groups = parameter_groups(model)
    everything = [*groups.matrices, *groups.weights, *groups.vectors]
    assert len(everything) == len(set(everything)) == len(list(model.parameters()))
    assert set(everything) == set(model.parameters())


def test_groups_by_name(make_model):
    model = make_model(noise_dims=3)
    groups = parameter_groups(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    kinds = [
        {names[p].split(".", 2)[-1] for p in group}
        for group in (groups.matrices, groups.weights, groups.vectors)
    ]
    matrices, weights, vectors = kinds
    attention = {f"{axis}.{part}.weight" for axis in ("space", "time") for part in ("qkv", "out")}
    assert matrices == attention | {"mlp.gate_up.weight", "mlp.down.weight"}
    assert {"modulation.weight"} < weights
    assert {"space.query_scale_d", "modulation.bias"} < vectors
    assert all(p.ndim == 2 for p in groups.matrices)
    assert muon_parameters(model) == groups.matrices
    assert names[model.token_embedding.view_VD] in {names[p] for p in groups.vectors}


def test_modulation_of_low_rank(make_model):
    model = make_model(modulation_rank=4)
    for block in model.blocks:
        inner, outer = block.modulation
        assert inner.weight.shape == (4, 64)
        assert inner.weight.std() > 0
        assert outer.weight.shape == (64 * block.num_parts, 4)
        assert any(inner.weight is weight for weight in parameter_groups(model).weights)
    fresh = CausalDiT(model.config, model.shape)
    assert not any(block.modulation[1].weight.any() for block in fresh.blocks), "blocks start as the identity"


def test_muon_takes_its_parameters():
    model = CausalDiT(DiTConfig(width=32, depth=4, num_heads=2), FrameShape(1, 3, 4, 4, 2, 2))
    torch.optim.Muon(muon_parameters(model), lr=0.02)
