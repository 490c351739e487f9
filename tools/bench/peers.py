"""Two peers and ours: as long a training on the same episodes and device, measured on the same windows.

    python tools/bench/peers.py --data data/lab --tokenizer runs/lab_tokenizer --ours configs/lab.yaml \
        --minutes 4 --device cuda --budget-s 590

`edm`: pixel-space U-Net after DIAMOND; `plain`: diffusion-forcing transformer with full attention and ten
steps; both in tools/bench/baselines, where their sources and our choices are told. They get about as many
parameters as ours. The two that work on latents share a tokenizer; --tokenizer-minutes is added to the pixel
model's time. Encoding is nobody's training time, nor are the first steps, which compile. All three are
averaged (EMA) and sampled in bfloat16 on a GPU, compiled.

What is trained stays in --work, so that a second call goes on where --budget-s ended the first: on the same
kind of device, or it is refused. With a GPU each, contenders can also be trained side by side: `--contenders
plain --ours RUN` needs a run of ours for its commands, tokenizer and size alone. Rows
`peers.<who>.psnr.h<frames>`, `.gain`, `.shuffle_ratio`, `.sharpness`, `.fps.b<batch>`, and
`peers.speed_at_equal_quality.<who>`: frames/s of ours at the fewest steps that reach the
peer's PSNR at the last horizon, over the peer's. WORK/peers.png shows some of the windows.
"""

import gc
import json
import math
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import peers_data
import torch
import yaml
from peers_data import Corpus
from peers_measure import compare, picture
from peers_roll import compiled, make_peer, measure_ours, measure_peer
from safetensors.torch import save_file
from table import add_rows, cpu_name
from torch import nn

from vidworld import cli
from vidworld.config import parse
from vidworld.errors import ConfigError, DataError
from vidworld.world.load import load

Who = Literal["ours", "plain", "edm"]
MEASURED = "measured-{}.json"
"""One a contender, so that several GPUs of a kind can share --work."""
ORDER: tuple[Who, ...] = ("ours", "plain", "edm")
UNTIMED_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train and measure peers."""

    data: tuple[Path, ...]
    """Datasets of videos of one robot, or a folder of them."""
    tokenizer: Path
    """Trained tokenizer of ours and of the plain transformer."""
    ours: Path
    """YAML of our world; data, tokenizer and minutes are set here. Or a run that is trained already."""
    contenders: tuple[Who, ...] = ("ours", "plain", "edm")
    minutes: float = 4.0
    """Of training, each."""
    tokenizer_minutes: float = 0.0
    """That the tokenizer took, for the one that needs none."""
    work: Path = Path("outputs/peers")
    device: str = "cuda"
    episodes: int = 64
    """Held-out windows, evenly spaced, one an episode."""
    context: int = 8
    horizons: tuple[int, ...] = (8, 24)
    our_steps: tuple[int, ...] = (1, 4)
    """Denoising steps of ours that are measured."""
    batch: int = 64
    """Rollouts side by side."""
    plain_batch: int = 32
    """Clips a step of the plain transformer, of as many frames as its window,"""
    edm_batch: int = 64
    """and of the U-Net, of six frames."""
    lr: float = 4e-4
    """Of both peers: more than their papers', for so short a training."""
    ema_decay: float = 0.998
    compile: bool = True
    seed: int = 0
    frames_gb: float = 40.0
    """Most that the training frames may take, on the device."""
    train_episodes: int | None = None
    """Of the peers' training set; ours reads all."""
    budget_s: float = 590.0
    """No training or measurement that would end later begins."""
    out: Path = Path("benchmarks/peers.json")

    def __post_init__(self) -> None:
        if not self.data:
            raise ConfigError("--data", got="nothing", expected="a dataset, or a folder of them")
        if not self.contenders or not self.horizons or min(self.horizons) < 1:
            raise ConfigError(
                "--contenders and --horizons",
                got=f"{self.contenders}, {self.horizons}",
                expected="one or more",
            )
        for name in ("minutes", "lr", "frames_gb"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"--{name.replace('_', '-')}", got=getattr(self, name), expected="above 0")


class Bench:
    """The clock, the device and the rows."""

    def __init__(self, options: Options, arguments: Sequence[str]) -> None:
        self.options, self.began = options, time.monotonic()
        self.gpu = options.device.startswith("cuda")
        self.device_name = torch.cuda.get_device_name() if self.gpu else cpu_name()
        self.command = " ".join(["python", "tools/bench/peers.py", *arguments])

    def has(self, seconds: float, what: str) -> bool:
        """Whether something of so many seconds would end in time; says so if not."""
        left = self.options.budget_s - (time.monotonic() - self.began)
        if left < seconds:
            print(f"no time for {what}: {left:.0f} s left; call again to go on", flush=True)
        return left >= seconds

    def add(self, rows: Mapping[str, tuple[float, str]]) -> None:
        """Print and keep."""
        for name, (value, unit) in rows.items():
            print(f"{name:<44} {value:12.4g} {unit}", flush=True)
        kept = {name: (float(f"{value:.4g}"), unit) for name, (value, unit) in rows.items()}
        add_rows(self.options.out, kept, device=self.device_name, command=self.command, packages=("torch",))

    def half(self) -> torch.autocast:
        """bfloat16 on a GPU."""
        return torch.autocast(self.options.device.split(":")[0], torch.bfloat16, enabled=self.gpu)

    def wait(self) -> None:
        """For the device."""
        if self.gpu:
            torch.cuda.synchronize()


def main(arguments: Sequence[str], prog: str) -> None:
    """Train what is not trained yet, and measure each as soon as it is: little is lost when time ends."""
    options = parse(Options, arguments, prog=prog)
    bench = Bench(options, arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    run = train_ours(bench)
    if run is None:
        return
    world = load(run, options.device)
    datasets = peers_data.open_all(options.data)
    cases = peers_data.cases(
        datasets, world, episodes=options.episodes, context=options.context, frames=max(options.horizons)
    )
    parameters = sum(parameter.numel() for parameter in world.model.parameters())
    corpus: Corpus | None = None
    found = read_measured(options)
    for who in (who for who in ORDER if who in options.contenders):
        minutes = options.minutes + (options.tokenizer_minutes if who == "edm" else 0)
        if who != "ours" and not is_trained(bench, who, minutes):
            if not bench.has(60 * minutes + (30 if corpus else 90), f"training {who}"):
                return
            corpus = corpus or peers_data.corpus(
                datasets,
                world,
                latents_of(options, run),
                options.device,
                most_gb=options.frames_gb,
                most_episodes=options.train_episodes,
            )
            train_peer(bench, who, make_peer(who, world, parameters), corpus, minutes)
        if any(name.partition(".")[0] == who for name in found):
            continue
        if not bench.has(90 if bench.gpu else 20, f"measuring {who}"):
            return
        if who == "ours":
            found |= measure_ours(bench, world, cases)
        else:
            found |= measure_peer(bench, who, world, parameters, cases)
        mine = {name: rows for name, rows in found.items() if name.partition(".")[0] == who}
        kept = [settings_of(options), mine]
        (options.work / MEASURED.format(who)).write_text(json.dumps(kept) + "\n")
        picture(options.work, options.work / "peers.png")
    compare(bench, found | read_measured(options))


def settings_of(options: Options) -> dict[str, Any]:
    """What figures depend on, beside the weights."""
    names = (
        "episodes",
        "context",
        "horizons",
        "our_steps",
        "batch",
        "minutes",
        "tokenizer_minutes",
        "compile",
    )
    facts = {name: getattr(options, name) for name in names} | {"data": [str(path) for path in options.data]}
    return json.loads(json.dumps(facts))


def read_measured(options: Options) -> dict[str, dict[str, tuple[float, str]]]:
    """What an earlier call measured in the same way."""
    found: dict[str, dict[str, tuple[float, str]]] = {}
    for path in sorted(options.work.glob(MEASURED.format("*"))):
        settings, of_who = json.loads(path.read_text())
        if settings == settings_of(options):
            found |= {
                name: {key: (value, unit) for key, (value, unit) in rows.items()}
                for name, rows in of_who.items()
            }
    return found


def train_ours(bench: Bench) -> Path | None:
    """Our run, trained by `vidworld train` if it is not there yet; None where time does not suffice."""
    options = bench.options
    if (options.ours / "world.json").is_file():
        return options.ours
    run, settings = options.work / "ours", yaml.safe_load(options.ours.read_text())
    if is_trained(bench, "ours", options.minutes):
        return run
    if not bench.has(60 * options.minutes + 60, "training ours"):
        return None
    for key in ("mix", "data"):
        settings.pop(key, None)
    found = [str(dataset.directory) for dataset in peers_data.open_all(options.data)]
    data = {"data": found[0]} if len(found) == 1 else {"mix": [{"data": path} for path in found]}
    loop = {**settings.get("loop", {}), "minutes": options.minutes, "steps": None}
    settings |= {**data, "tokenizer": str(options.tokenizer), "loop": loop}
    settings |= {"seed": options.seed, "wandb": "off"}
    path = options.work / "ours.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    overwrite = ["--overwrite"] if run.exists() else []
    if code := cli.run(["train", str(path), "--out", str(run), *overwrite]):
        raise SystemExit(code)
    note_trained(bench, "ours", options.minutes, {})
    gc.collect()
    if bench.gpu:
        torch.cuda.empty_cache()
    return run


def latents_of(options: Options, run: Path) -> Path:
    """Where ours found or made its latents."""
    settings = {} if options.ours.is_dir() else yaml.safe_load(options.ours.read_text())
    return Path(settings.get("latents") or run / "latents")


def note_trained(bench: Bench, who: str, minutes: float, facts: Mapping[str, Any]) -> None:
    """Written last, so that what is half trained is trained again."""
    told = {"minutes": minutes, "device": bench.device_name, **facts}
    (bench.options.work / MEASURED.format(who)).unlink(missing_ok=True)
    (bench.options.work / f"{who}.json").write_text(json.dumps(told) + "\n")


def is_trained(bench: Bench, who: str, minutes: float) -> bool:
    """Whether a contender lies in --work. Raises DataError for one of another device or length."""
    path = bench.options.work / f"{who}.json"
    if not path.is_file():
        return False
    told = json.loads(path.read_text())
    for name, expected in (("device", bench.device_name), ("minutes", minutes)):
        if told[name] != expected:
            raise DataError(
                f"{name} of {who}'s training",
                where=path,
                got=told[name],
                expected=expected,
                fix="compare on one device and for one time: use another --work",
            )
    return True


def train_peer(bench: Bench, who: str, net: nn.Module, corpus: Corpus, minutes: float) -> None:
    """AdamW with a warm-up and a fall over the last third of the time; averaged weights are kept."""
    options = bench.options
    torch.manual_seed(options.seed)
    net = net.to(options.device)
    if who == "edm":
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    weights = [parameter.detach() for parameter in net.parameters()]
    averaged = [weight.clone() for weight in weights]
    optimizer = torch.optim.AdamW(
        net.parameters(), options.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=bench.gpu
    )
    compiled(net, bench)
    random = torch.Generator().manual_seed(options.seed)
    config: Any = net.config
    frames = config.window if who == "plain" else config.context + 1 + config.own_steps
    batch = options.plain_batch if who == "plain" else options.edm_batch
    step, began, loss = 0, time.monotonic(), torch.zeros(())
    total = sum(parameter.numel() for parameter in net.parameters())
    print(f"{who}: {total / 1e6:.1f}M parameters, {batch} clips of {frames} frames", flush=True)
    while True:
        if step == UNTIMED_STEPS:
            bench.wait()
            began = time.monotonic()
        progress = (time.monotonic() - began) / (60 * minutes) if step >= UNTIMED_STEPS else 0.0
        if progress >= 1:
            break
        rate = min(1.0, (step + 1) / 100) * min(1.0, 3 * (1 - progress))
        for group in optimizer.param_groups:
            group["lr"] = options.lr * rate
        given, actions_BTA = corpus.clips(who == "plain", batch, frames, random)
        with bench.half():
            loss = net.loss(given, actions_BTA)  # type: ignore[operator]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        # An average that starts late: the first steps would else stay in it for as long as a short run lasts.
        decay = min(options.ema_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(averaged, weights, 1 - decay)
        step += 1
        if step % 20 == 0:
            bench.wait()  # the clock is that of the device, not of what is queued for it
        if step % 200 == 0:
            print(f"{who}: step {step}, loss {float(loss.detach()):.4f}, {progress:.0%}", flush=True)
    if not math.isfinite(float(loss.detach())):
        raise DataError(f"training of {who}", got="a loss that is not finite", fix="take a smaller --lr")
    with torch.no_grad():
        torch._foreach_copy_(weights, averaged)
    kept = {name: value.cpu().contiguous() for name, value in net.state_dict().items()}
    save_file(kept, options.work / f"{who}.safetensors")
    note_trained(bench, who, minutes, {"steps": step, "parameters": total, "config": asdict(config)})
    print(f"{who}: {step} steps in {minutes:.1f} minutes", flush=True)


if __name__ == "__main__":
    from vidworld.errors import VidworldError

    warnings.simplefilter("once")
    try:
        main(sys.argv[1:], "python tools/bench/peers.py")
    except VidworldError as error:
        raise SystemExit(f"error: {error}") from None
