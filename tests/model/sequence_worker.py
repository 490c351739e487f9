"""One rank of a group that shares clips: torchrun sequence_worker.py OUT."""

import importlib.util
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from vidworld.errors import ConfigError
from vidworld.model.compile import compile_blocks
from vidworld.model.sequence import (
    frames_of,
    gather_frames,
    sequence_groups,
    shard_sequence,
    to_all_frames,
    to_all_tokens,
)
from vidworld.model.two_stream import target_predictor


def toys():
    """The tests' conftest, which is no package."""
    spec = importlib.util.spec_from_file_location("toys", Path(__file__).with_name("conftest.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trained(model, make_clip, time):
    """A loss over all targets and its gradients; 2 rows on their own too, as the bootstrap does."""
    context, targets = make_clip(time=time, seed=1), make_clip(time=time, seed=2)
    predict = target_predictor(model, context.frames, context.level, context.conditioning)
    with torch.no_grad():
        rows = slice(0, 2)
        taught = predict(targets[rows].frames, targets[rows].level, targets[rows].step_BT, rows=rows)
    predicted = predict(targets.frames, targets.level, targets.step_BT)
    loss = predicted.latents_BTVChw.square().mean() + predicted.proprio_BTS.square().mean()
    model.zero_grad()
    loss.backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {"taught": taught.latents_BTVChw, "predicted": predicted.latents_BTVChw.detach(), **grads}


def largest(got, expected):
    assert got.keys() == expected.keys()
    return max(float((got[key] - expected[key]).abs().max()) for key in expected)


def main() -> None:
    dist.init_process_group("gloo")
    conftest = toys()
    make_model, make_clip = conftest.make_model.__wrapped__(), conftest.make_clip.__wrapped__()
    group = sequence_groups(dist.get_world_size())
    results = {}

    x_BTND = torch.arange(2 * 12 * 7 * 3, dtype=torch.float64).view(2, 12, 7, 3)
    half = x_BTND.chunk(group.size, 1)[group.rank].clone().requires_grad_()
    there = to_all_frames(half, group)
    back = to_all_tokens(there, 7, group)
    results["all_frames"] = float((there - x_BTND.tensor_split(group.size, 2)[group.rank]).abs().max())
    results["back"] = float((back - half).abs().max())
    results["gathered"] = float((gather_frames(back, group) - x_BTND).abs().max())
    (gradient,) = torch.autograd.grad((back * (1 + half.detach())).sum(), half)
    results["gradient"] = float((gradient - 1 - half.detach()).abs().max())

    cases = {
        "eager": {},
        "rectangles": {"attention": "rectangles"},
        "previous frame": {"previous_frame": True},
        "compiled": {},
    }
    for name, changes in cases.items():
        model = make_model(**changes).requires_grad_(True)
        expected = trained(model, make_clip, time=4)
        shard_sequence(model, group)
        if name == "compiled":
            compile_blocks(model, backend="aot_eager")
        got = trained(model, make_clip, time=4)
        alone = {key: value.clone() for key, value in got.items()}
        for key, value in got.items():
            if key not in ("taught", "predicted"):  # what DDP does
                dist.all_reduce(value)
                value /= group.size
        results[name] = largest(got, expected)
        if name == "eager":
            results["negative_control"] = largest(alone, expected)
    try:
        frames_of(group, 2 * group.size + 1)
    except ConfigError as error:
        results["refused"] = str(error)
    torch.save(results, Path(sys.argv[1]) / f"rank-{group.rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
