"""What `vidworld plan` counts is what the model has, does and keeps; it predicts what was measured."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vidworld.cli import run as run_command
from vidworld.config import to_yaml
from vidworld.errors import ConfigError
from vidworld.model.compile import compile_blocks
from vidworld.model.config import DiTConfig
from vidworld.model.dit import CausalDiT
from vidworld.model.flops import forward_flops, visible_pairs
from vidworld.model.inputs import Conditioning, FrameShape, Streams
from vidworld.model.parameters import muon_parameters
from vidworld.trainer.optim import OptimConfig, build_optimizers, orthogonalise
from vidworld.trainer.plan.cluster import STRATEGIES, Cluster, communication, exposed
from vidworld.trainer.plan.estimate import Layout, Subject, best, estimate
from vidworld.trainer.plan.hardware import (
    GPUS,
    MEASURED_PRODUCTS,
    MEASURED_STEPS,
    OWN_STEPS,
    Roofline,
    gpu_named,
)
from vidworld.trainer.plan.memory import GIB, trace_activations
from vidworld.trainer.plan.work import (
    BRANCH_BYTES,
    FUSED_BRANCH_BYTES,
    AttentionWork,
    Product,
    StepWork,
    newton_schulz_flops,
    step_seconds,
    step_work,
    uncounted_flops,
)
from vidworld.types import Frames, SignalLevel

H100 = Roofline(GPUS["h100"])
configs = st.builds(
    lambda heads, groups, half, depth, every, registers, noise: DiTConfig(
        width=8 * half * heads * groups,
        depth=max(depth, every),
        num_heads=heads * groups,
        num_kv_heads=heads,
        time_every=every,
        num_registers=registers,
        noise_dims=noise,
    ),
    *(st.integers(1, 2), st.integers(1, 3), st.integers(1, 2)),
    *(st.integers(1, 5), st.integers(1, 3), st.integers(0, 3), st.integers(0, 2)),
)
shapes = st.builds(
    lambda views, channels, rows, columns, proprio, action, k, robots: FrameShape(
        views, channels, 2 * rows, 2 * columns, proprio, action, k, robots
    ),
    *(st.integers(1, 2), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
    *(st.integers(1, 4), st.integers(1, 4), st.integers(1, 2), st.integers(1, 2)),
)


def inputs(model, streams, rows, dtype=torch.float32):
    shape, size = model.shape, (rows, streams.num_queries)
    noise_dims = model.config.noise_dims
    return (
        Frames(
            torch.randn(*size, shape.views, shape.channels, shape.height, shape.width, dtype=dtype),
            torch.randn(*size, shape.proprio_dims, dtype=dtype),
        ),
        SignalLevel.from_signal(torch.rand(size, dtype=dtype)),
        torch.rand(size, dtype=dtype),
        Conditioning(
            torch.randn(*size, shape.actions_per_frame, shape.action_dims, dtype=dtype),
            torch.ones(size, dtype=torch.bool),
            torch.zeros(rows, dtype=torch.int64),
            torch.randn(*size, noise_dims, dtype=dtype) if noise_dims else None,
        ),
    )


def written_out(config: DiTConfig, shape: FrameShape) -> int:
    """The number of weights, from the architecture's description in docs/model.md."""
    d, h, c = config.width, config.mlp_hidden, config.patch_size**2 * shape.channels
    kv = 2 * config.num_kv_heads * config.head_dim
    attention = d * (d + kv) + d * d + 2 * config.head_dim
    time_layers = config.depth // config.time_every
    space_layers = config.depth - time_layers
    blocks = config.depth * (attention + 3 * d * h) + time_layers * attention
    blocks += (6 * space_layers + 9 * time_layers) * (d * d + d)
    places = (shape.height // config.patch_size) * (shape.width // config.patch_size)
    robots, k = shape.num_embodiments, shape.actions_per_frame
    tokens = c * d + d + (shape.views + places + config.num_registers) * d
    tokens += robots * (shape.proprio_dims + 1) * d
    actions = robots * (shape.action_dims + 1) * d + (k + 1) * d
    condition = (256 * d + d) + (d * d + d) + (k * d * d + d) + (d * d + d)
    condition += (robots + config.noise_dims) * d
    heads = 2 * d * d + 2 * d + d * c + c + robots * (d + 1) * shape.proprio_dims
    return blocks + tokens + actions + condition + heads


@settings(deadline=None, max_examples=25)
@given(configs, shapes, st.integers(1, 3), st.integers(1, 2), st.integers(1, 3))
def test_parameters_and_operations_are_those_of_the_model(config, shape, frames, targets, rows):
    model, streams = CausalDiT(config, shape), Streams(frames, targets=targets)
    assert sum(parameter.numel() for parameter in model.parameters()) == written_out(config, shape)
    work = step_work(model, streams, rows, muon=True)
    assert work.num_parameters == written_out(config, shape)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(*inputs(model, streams, rows), streams=streams)
    time_layers = sum(map(config.attends_time, range(config.depth)))
    hidden = streams.num_queries * streams.num_keys - visible_pairs(streams)
    masked = 4 * config.width * model.tokens_per_frame * time_layers * hidden * rows
    embodiment = uncounted_flops(model, streams, rows)
    assert counter.get_total_flops() == work.forward_flops + embodiment + masked
    assert work.forward_flops + embodiment == rows * forward_flops(model, streams)
    assert embodiment >= 0
    assert sorted(work.matrices) == sorted(tuple(p.shape) for p in muon_parameters(model))


def test_newton_schulz_counts_what_torch_counts():
    for size in ((48, 16), (16, 48), (32, 32)):
        with FlopCounterMode(display=False) as counter:
            orthogonalise(torch.randn(2, *size))
        assert counter.get_total_flops() == 2 * newton_schulz_flops(*size)


def kept_for_real(model, streams, rows, *, bf16):
    """Bytes that autograd keeps in a real forward pass on the CPU, each storage once, without weights."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        predicted, _ = model(*inputs(model, streams, rows), streams=streams)
    total = sum(size for size, _ in kept.values())
    del predicted
    return total


SIZES = {
    "small": (
        DiTConfig(width=64, depth=4, num_heads=2, num_kv_heads=1),
        FrameShape(1, 4, 8, 8, 3, 2),
        4,
        1,
        3,
    ),
    "deep": (
        DiTConfig(width=48, depth=9, num_heads=3, num_kv_heads=3),
        FrameShape(1, 8, 8, 8, 7, 7),
        3,
        2,
        2,
    ),
    "views": (
        DiTConfig(width=96, depth=6, num_heads=4, num_kv_heads=2, time_every=2, noise_dims=4),
        FrameShape(2, 4, 8, 12, 7, 6, 2, 3),
        *(5, 1, 4),
    ),
    "every_layer": (
        DiTConfig(width=32, depth=3, num_heads=2, num_kv_heads=2, time_every=1, residual="autocast"),
        FrameShape(1, 4, 16, 16, 3, 2),
        *(6, 1, 2),
    ),
}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_activations_are_what_autograd_keeps(size, bf16):
    config, shape, frames, targets, rows = SIZES[size]
    streams = Streams(frames, targets=targets)
    torch.manual_seed(0)
    real = kept_for_real(CausalDiT(config, shape), streams, rows, bf16=bf16)
    traced = trace_activations(config, shape, streams, bf16=bf16, compiled=False)
    predicted = rows * traced.per_row(checkpointed=False) + traced.weight_copies
    assert predicted == pytest.approx(real, rel=0.1)
    checkpointed = CausalDiT(config, shape)
    checkpointed.checkpoint_blocks = True
    real = kept_for_real(checkpointed, streams, rows, bf16=bf16)
    predicted = rows * traced.per_row(checkpointed=True) + traced.outside.weight_copies
    assert predicted == pytest.approx(real, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_compiled_activations_are_what_the_graphs_hand_over(size):
    """A real run of really compiled blocks, cut by the same partitioner, tensors counted as they come."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    config, shape, frames, targets, rows = SIZES[size]
    streams = Streams(frames, targets=targets)
    torch.manual_seed(0)
    model = CausalDiT(config, shape)
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept = {}

    def forward(gm, example_inputs):
        def call(*arguments):
            outputs = gm(*arguments)
            known = weights | {t.untyped_storage()._cdata for t in arguments if isinstance(t, torch.Tensor)}
            streams_in = [t for t in arguments if isinstance(t, torch.Tensor) and t.ndim == 4]
            for tensor in outputs[1:]:
                if isinstance(tensor, torch.Tensor):
                    key = tensor.untyped_storage()._cdata
                    if key not in known or any(tensor is one for one in streams_in):
                        kept[key] = (tensor.untyped_storage().nbytes(), tensor)
            return outputs

        return make_boxed_func(call)

    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=lambda gm, example_inputs: make_boxed_func(gm.forward),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    torch.compiler.reset()
    compile_blocks(model, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        predicted, _ = model(*inputs(model, streams, rows), streams=streams)
    real = sum(size for size, _ in kept.values())
    del predicted
    torch.compiler.reset()
    traced = trace_activations(config, shape, streams, bf16=True, compiled=True)
    blocks = [(traced.num_space, traced.space_block), (traced.num_time, traced.time_block)]
    expected = sum(count * (rows * block.per_row + block.weight_copies) for count, block in blocks)
    assert expected == pytest.approx(real, rel=0.1)


def test_state_is_what_the_optimizers_hold():
    config, shape = DiTConfig(width=64, depth=4, num_heads=2, num_kv_heads=1), FrameShape(1, 4, 8, 8, 3, 2)
    for name in ("muon", "adamw"):
        model = CausalDiT(config, shape)
        optimizers = build_optimizers(
            list(model.named_parameters()), OptimConfig(name=name), muon_parameters(model)
        )
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        moments = 0
        for optimizer in optimizers.values():
            optimizer.step()
            moments += sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.ndim)
        one = estimate(subject(config, shape, muon=name == "muon"), Cluster(GPUS["h100"]), Layout("ddp", 2))
        assert one.memory_gib["optimizer"] * GIB == moments
        assert one.memory_gib["weights"] * GIB == sum(p.nbytes for p in model.parameters())


def subject(config=SIZES["small"][0], shape=SIZES["small"][1], frames=16, **changes):
    settings = {"muon": False, "bf16": True, "compiled": False} | changes
    return Subject(config, shape, Streams(frames, targets=1), **settings)


def test_measured_products_are_met():
    for m, k, n, tflops in MEASURED_PRODUCTS:
        assert 2 * m * k * n / H100.product(m, k, n) / 1e12 == pytest.approx(tflops, rel=0.12)


@pytest.mark.parametrize("row", MEASURED_STEPS, ids=str)
def test_measured_steps_are_met(row):
    frames, tokens, d = 16, row.clips * 16 * row.tokens_per_frame, row.width
    length = frames * row.tokens_per_frame
    pairs = row.tokens_per_frame**2 * frames * (frames + 1) // 2
    work = StepWork(
        tuple(Product(tokens, k * d, n * d, row.layers) for k, n in ((1, 3), (1, 1), (1, 4), (4, 1))),
        (Product(row.clips * frames, d, 6 * d, row.layers),),
        (AttentionWork(row.clips, length, length, pairs, d, row.head_dim, row.layers, "flex"),),
        BRANCH_BYTES["float32"] * tokens * d * 2 * row.layers,
        row.layers * 18 * d * d,
    )
    assert tokens / sum(step_seconds(work, H100).values()) == pytest.approx(row.tokens_per_s, rel=0.15)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("row", OWN_STEPS, ids=str)
def test_own_steps_are_met(row, fused):
    measured = row.fused_ms if fused else row.plain_ms
    if measured is None:
        pytest.skip("not measured")
    heads, kv_heads = row.heads
    config = DiTConfig(width=row.width, depth=row.layers, num_heads=heads, num_kv_heads=kv_heads)
    with torch.device("meta"):
        model = CausalDiT(config, FrameShape(1, 16, row.side, row.side, proprio_dims=4, action_dims=2))
    work = step_work(model, Streams(16, targets=1), row.clips, fused=fused)
    assert 1e3 * sum(step_seconds(work, H100).values()) == pytest.approx(measured, rel=0.12)


def test_fused_kernels_count_where_training_uses_them():
    def elementwise(fused, ranks=1, **layout):
        cluster = Cluster(GPUS["h100"], 1, ranks)
        planned = estimate(
            subject(compiled=True, fused=fused), cluster, Layout(**({"strategy": "ddp", "rows": 4} | layout))
        )
        return planned.step_s["elementwise"]

    plain, saved = elementwise("off"), FUSED_BRANCH_BYTES / BRANCH_BYTES["float32"]
    assert elementwise("auto") == pytest.approx(saved * plain)
    assert elementwise("auto", ranks=2) == plain
    assert elementwise("on", ranks=2) == pytest.approx(saved * plain)
    assert elementwise("on", ranks=2, strategy="fsdp2") == plain


def test_other_gpus_are_scaled():
    slow = Roofline(GPUS["rtx4090"])
    assert slow.product(4096, 4096, 4096) / H100.product(4096, 4096, 4096) == pytest.approx(
        989 / 165, rel=0.1
    )
    assert slow.traffic(1e9) / H100.traffic(1e9) == pytest.approx(3.35 / 1.008)


def test_communication_identities():
    one, node, two = (Cluster(GPUS["h100"], *size) for size in ((1, 1), (1, 8), (2, 8)))
    kinds = {"passes": 2, "accumulation": 1}
    for strategy in STRATEGIES.values():
        assert sum(communication(strategy, one, 10**9, **kinds).values()) == 0
    volume = {name: sum(communication(s, node, 10**9, **kinds).values()) for name, s in STRATEGIES.items()}
    assert volume["ddp"] == pytest.approx(volume["zero2"])  # reduce-scatter and all-gather are an all-reduce
    assert volume["zero1"] > volume["zero2"]
    assert volume["zero3"] == pytest.approx(1.5 * volume["zero2"])
    across = sum(communication(STRATEGIES["ddp"], two, 10**9, **kinds).values())
    assert across > 5 * volume["ddp"], "the network is 9 times slower"
    # Twice 7/8 GB over 450 GB/s, at 75 %.
    assert volume["ddp"] == pytest.approx(2 * 0.875 / 337.5, rel=0.8)
    assert exposed(STRATEGIES["ddp"], {"gradients": 0.5}, 1.0) == 0
    assert exposed(STRATEGIES["zero1"], {"gradients": 0.5}, 1.0) == 0.5


def test_sharding_cuts_memory_and_checkpointing_costs_time():
    cluster, plain = Cluster(GPUS["h100"], 1, 8), subject()
    found = {name: estimate(plain, cluster, Layout(name, 8)) for name in STRATEGIES}
    part = {name: one.memory_gib for name, one in found.items()}
    assert part["zero1"]["gradients"] == part["ddp"]["gradients"] == 8 * part["zero2"]["gradients"]
    assert part["zero3"]["weights"] < part["zero2"]["weights"] == part["ddp"]["weights"]
    again = estimate(plain, cluster, Layout("ddp", 8, checkpointed=True))
    assert again.memory_gib["activations"] < 0.5 * part["ddp"]["activations"]
    assert again.seconds > found["ddp"].seconds
    assert again.model_flops == found["ddp"].model_flops, "recomputation earns no utilisation"
    two = estimate(plain, cluster, Layout("ddp", 8, sequence_parallel=2))
    assert two.memory_gib["activations"] == pytest.approx(part["ddp"]["activations"] / 2)
    assert two.tokens_per_step == found["ddp"].tokens_per_step // 2


def test_checkpointing_is_suggested_only_when_memory_needs_it():
    roomy = best(subject(), Cluster(GPUS["h100"]), batch=8)
    assert roomy is not None
    assert not roomy.layout.checkpointed
    kept = estimate(subject(), Cluster(GPUS["h100"]), Layout("ddp", 1))
    tight = replace(GPUS["h100"], memory_gib=kept.total_gib - 0.3 * kept.memory_gib["activations"])
    suggested = best(subject(), Cluster(tight), batch=1)
    assert suggested is not None
    assert suggested.layout.checkpointed
    assert best(subject(), Cluster(replace(tight, memory_gib=0.5)), batch=None) is None


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        (Layout("zero4", 1), {}, "engine.strategy: got zero4"),
        (Layout("zero1", 1), {"muon": True}, "got muon, expected adamw"),
        (Layout("ddp", 1, sequence_parallel=3), {}, "engine.sequence_parallel: got 3"),
    ],
)
def test_what_training_refuses_is_refused(layout, changes, message):
    with pytest.raises(ConfigError, match=message):
        estimate(subject(**changes), Cluster(GPUS["h100"]), layout)


def test_unknown_gpus_are_named():
    assert gpu_named("H100").name == "h100"
    with pytest.raises(ConfigError, match="got v100, expected one of h100"):
        gpu_named("v100")


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "world.yaml"
    model = {"width": 64, "depth": 4, "num_heads": 2, "num_kv_heads": 1}
    path.write_text(
        yaml.safe_dump(
            {
                "kind": "world",
                "data": "nowhere",
                "tokenizer": "nowhere",
                "model": model,
                "engine": {"compile": "off"},
                "loader": {"clip_frames": 8, "batch_size": 32},
                "loop": {"steps": 1000},
            }
        )
    )
    return path


def plan(*arguments):
    return run_command(["plan", *map(str, arguments)])


def test_the_command_prints_a_plan(config, capsys):
    shape = ("--latent-shape", "1x4x8x8", "--gpus-per-node", 4, "--nodes", 2)
    assert plan(config, *shape, "--price-per-gpu-hour", 2, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gpus"] == 8
    assert found["config"]["layout"]["rows"] == 4
    assert found["config"]["tokens_per_step"] == 32 * found["tokens_per_clip"]
    budget = found["budget"]
    assert budget["steps"] == 1000
    assert budget["cost"] == pytest.approx(2 * budget["gpu_hours"])
    seconds = 1000 * found["config"]["step_total_s"]
    assert budget["gpu_hours"] == pytest.approx(8 * seconds / 3600)
    assert plan(config, *shape, "--tokens", 1e9) == 0
    said = capsys.readouterr().out
    assert "your config" in said
    assert "ddp, 4 clips a micro-batch" in said
    assert all(f"  - {text}" in said for text in found["assumptions"])
    assert f"{-(-(10**9) // found['config']['tokens_per_step']):,} steps" in said


def test_a_batch_that_cannot_be_cut_gets_a_suggestion(config, capsys):
    assert plan(config, "--latent-shape", "1x4x8x8", "--gpus-per-node", 8, "--nodes", 32) == 0
    said = capsys.readouterr().out
    assert "got 32, expected a multiple of 256" in said
    assert "--loader.batch-size" in said


def test_the_shape_comes_from_the_data(
    planar, tokenizer_run, latents, settings: SimpleNamespace, tmp_path, capsys
):
    path = tmp_path / "world.yaml"
    path.write_text(to_yaml(settings.world(latents, tokenizer_run)))
    assert plan(path, "--json", "--engine.compile", "off") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] > 0
    assert found["config"]["layout"]["rows"] == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--latent-shape VIEWSxCHANNELSxHEIGHTxWIDTH"),
        (("--latent-shape", "8x8"), "--latent-shape: got 8x8"),
        (("--latent-shape", "1x4x8x8", "--gpu", "h1000"), "--gpu: got h1000, expected one of h100"),
        (("--latent-shape", "1x4x8x8", "--nodes", "0"), "--nodes: got 0, expected above 0"),
        (("--latent-shape", "1x4x8x8", "--tokens", "1", "--steps", "1"), "--tokens and --steps: got both"),
        (("--latent-shape", "1x4x9x8"), "multiple of patch_size"),
        (("--latent-shape", "1x4x8x8", "--time-stride", "4"), "number of frames"),
        (("--latent-shape", "1x4x8x8", "--price", "x"), "price"),
    ],
)
def test_bad_input_is_one_line(config, arguments, message, capsys):
    assert plan(config, *arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_tokenizer_is_not_planned(tmp_path, capsys):
    path = tmp_path / "tokenizer.yaml"
    path.write_text("kind: tokenizer\ndata: nowhere\n")
    assert plan(path) == 2
    assert "got tokenizer, expected world" in capsys.readouterr().err
