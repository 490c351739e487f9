"""Weak scaling: the same training on more GPUs, each with the batch of one; and whether it stays the same.

    python tools/bench/scaling.py --gpus 1 2 4                       # lab, then 12x768, under DDP
    python tools/bench/scaling.py --gpus 1 2 4 --cases 12x768 --variants ddp ddp_bf16 zero1 zero3 fsdp2
    python tools/bench/scaling.py --gpus 1 4 --cases configs/lab.yaml -- --latents latents/lab --tokenizer lab
    python tools/bench/scaling.py --gpus 1 4 --cases 12x768 -- --engine.fused on      # else off on any number
    python tools/bench/scaling.py --device cpu --gpus 1 2 --cases 2x64 --seconds 5 --log-every 2   # a toy

A case is `lab` (the settings of configs/lab.yaml) or LAYERSxWIDTH, on latents of noise that the real loader
reads; or a YAML on its own data, with overrides after `--`. Every run is `training/train.py`, on one GPU
without a launcher and on more through torchrun, and is read through its metrics.jsonl: the median of the log
lines after the first few. Far from its end, so without bootstrap, looks and checkpoints. All runs share the
compiler's cache, so that only the first compiles.

Rows: `scaling.weak.<case>.<n>` is the speed of n GPUs over n times the speed of one, under DDP;
`scaling.weak.<case>.<variant>.<n>` that of another way to spread the work, over n times one GPU with the same
optimizer under DDP. `scaling.equal.<case>.<n>` compares n GPUs with one GPU that accumulates n micro-batches,
which draw the same noise: the largest relative difference of loss and gradient norm in the first step, which
differs by rounding alone, and `scaling.equal_<k>...` that over k steps, in which it grows.
"""

import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from scaling_runs import Case, RunError, Speed, Trainer, differences, make_case
from table import add_rows, cpu_name

from vidworld.config import parse
from vidworld.errors import ConfigError, UserError

Variant = Literal[
    "ddp", "ddp_bf16", "adamw", "muon", "muon_sharded", "muon_bf16", "zero1", "zero2", "zero3", "fsdp2"
]
ADAMW = {"optim.name": "adamw"}
MUON = {"optim.name": "muon"}
CHANGES: dict[Variant, dict[str, Any]] = {
    "ddp": {},
    "ddp_bf16": {"engine.reduce": "bf16"},
    "adamw": ADAMW,
    "muon": MUON,
    "muon_sharded": {**MUON, "optim.muon_sharded": True},
    "muon_bf16": {**MUON, "optim.muon_sharded": True, "engine.reduce": "bf16"},
    **{name: {**ADAMW, "engine.strategy": name} for name in ("zero1", "zero2", "zero3", "fsdp2")},
}
"""What a variant changes in the case's settings."""
TOLERANCE = 1e-5
"""Of the first step, where only the order of sums over ranks differs; six digits are logged."""
SKIP = 3
"""Log lines at the start that do not count."""


@dataclass(frozen=True)
class Options:
    """Measure weak scaling, and compare several GPUs with one."""

    gpus: tuple[int, ...] = (1, 2, 4)
    """Processes; one is always measured."""
    cases: tuple[str, ...] = ("lab", "12x768")
    variants: tuple[Variant, ...] = ("ddp",)
    """`ddp` on all of `gpus`, the others on most of them; `muon_bf16` is sharded too."""
    seconds: float = 15.0
    """Of training, from the first log line on."""
    log_every: int = 10
    """Steps of a log line."""
    equal_steps: int = 8
    """Steps in which most GPUs are compared with one; 0 leaves it out."""
    rows: int | None = None
    """Clips of a GPU; by default 48 for `lab`, what fits into 80 GB for the sizes, and what a YAML says."""
    budget_s: float = 540.0
    """No run begins that would not end by then."""
    start_s: float = 240.0
    """Longest wait for the first log line of a run."""
    device: Literal["cuda", "cpu"] = "cuda"
    work: Path | None = None
    """Where the runs and their logs go and stay; default: a temporary folder."""
    out: Path | None = Path("benchmarks/scaling.json")
    """Rows are added here as soon as they are measured; `None`: only print."""

    def __post_init__(self) -> None:
        if not self.gpus or min(self.gpus) < 1:
            raise ConfigError("--gpus", got=self.gpus, expected="numbers from 1 on")
        for name in ("log_every", "seconds"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"--{name.replace('_', '-')}", got=getattr(self, name), expected="above 0")


def main(arguments: Sequence[str], prog: str) -> None:
    """Measure, print, and write each row as soon as it is there."""
    own, overrides = list(arguments), []
    if "--" in own:
        at = own.index("--")
        own, overrides = own[:at], own[at + 1 :]
    options = parse(Options, own, prog=prog)
    have = torch.cuda.device_count()
    if options.device == "cuda" and max(options.gpus) > have:
        raise ConfigError("--gpus", got=max(options.gpus), expected=f"at most the {have} that are here")
    with ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vidworld-")))
        work.mkdir(parents=True, exist_ok=True)
        scaling = Scaling(options, work, " ".join(["python", "tools/bench/scaling.py", *arguments]))
        for name in options.cases:
            toy = options.device == "cpu"
            case = make_case(name, work, rows=options.rows, toy=toy, overrides=overrides)
            scaling.case(case)
        scaling.close()


@dataclass
class Scaling:
    """All runs of a call, and the time that is left for them."""

    options: Options
    work: Path
    command: str
    began: float = field(default_factory=time.monotonic)
    took_s: list[float] = field(default_factory=list)
    """Of each run, without the seconds in which it was measured."""
    speeds: dict[tuple[str, str, int], Speed] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.trainer = Trainer(self.work, self.options.device, self.options.start_s)
        self.most = max(self.options.gpus)

    def case(self, case: Case) -> None:
        """DDP on all numbers of GPUs, then whether most of them do the same as one, then other ways."""
        print(
            f"{case.name}: {case.rows} clips of {case.training.loader.clip_frames} frames a GPU", flush=True
        )
        if "ddp" in self.options.variants:
            for ranks in sorted({1, *self.options.gpus}):
                self.speed(case, "ddp", ranks)
        if self.options.equal_steps and self.most > 1:
            self.equal(case)
        for variant in self.options.variants:
            if variant != "ddp":
                self.speed(case, variant, self.most)

    def speed(self, case: Case, variant: Variant, ranks: int) -> Speed | None:
        """Measure a variant, and before it the one GPU that it is compared with; None if that cannot be."""
        one = self._one(case, variant)
        key = (case.name, one if ranks == 1 else variant, ranks)
        if key in self.speeds:
            return self.speeds[key]
        alone = None if ranks == 1 else self.speed(case, one, 1)
        seconds = self.options.seconds

        def enough(lines: list[dict[str, Any]], elapsed_s: float) -> bool:
            return elapsed_s >= seconds and len(lines) > SKIP

        lines = self._run(
            case, f"{case.name}-{key[1]}-{ranks}", ranks, CHANGES[key[1]], self.options.log_every, enough
        )
        if lines is None:
            return None
        self.speeds[key] = speed = Speed.of(lines, skip=SKIP)
        label = case.name if key[1] == "ddp" else f"{case.name}.{key[1]}"
        rows = {
            f"tok_s.{label}.{ranks}": (round(speed.tok_s, 1), "tokens/s"),
            f"step_ms.{label}.{ranks}": (round(speed.step_ms, 3), "ms"),
            f"memory_gib.{label}.{ranks}": (round(speed.memory_gib, 3), "GiB"),
            f"data_wait.{label}.{ranks}": (round(100 * speed.wait_share, 3), "%"),
        }
        share = ""
        if alone is not None:
            weak = speed.tok_s / (ranks * alone.tok_s)
            rows[f"weak.{label}.{ranks}"] = (round(weak, 4), "x of n times one")
            share = f"  {weak:.3f} of {ranks} x one"
        print(
            f"  {key[1]:<12} {ranks} x {self.options.device}  {speed.step_ms:9.2f} ms "
            f"(+-{50 * speed.spread:.1f} %)  {speed.tok_s:12,.0f} tokens/s  {speed.memory_gib:6.2f} GiB  "
            f"wait {100 * speed.wait_share:.1f} %{share}",
            flush=True,
        )
        self._write(rows)
        return speed

    def equal(self, case: Case) -> None:
        """The first steps of most GPUs against one GPU that does their micro-batches one after the other."""
        steps, found = self.options.equal_steps, []
        for ranks, changes in ((self.most, {}), (1, {"engine.accumulation": self.most})):
            lines = self._run(
                *(case, f"{case.name}-equal-{ranks}", ranks, changes, 1),
                lambda lines, _: len(lines) >= steps,
            )
            if lines is None:
                return
            found.append(lines[:steps])
        many, one = found
        apart = differences(one, many)
        verdict = "equal" if apart[0] <= TOLERANCE else "NOT EQUAL"
        print(
            f"  {self.most} GPUs and one: {verdict}; loss and gradient norm differ by {apart[0]:.1e} in the "
            f"first step (tolerance {TOLERANCE:g}), by up to {max(apart):.1e} in {len(apart)}",
            flush=True,
        )
        if apart[0] > TOLERANCE:
            self.failed.append(f"{case.name}: the first step of {self.most} GPUs is another than that of one")
        unit = "relative difference"
        self._write(
            {
                f"equal.{case.name}.{self.most}": (apart[0], unit),
                f"equal_{len(apart)}.{case.name}.{self.most}": (max(apart), unit),
            }
        )

    def close(self) -> None:
        """Say what was left out; raises SystemExit when something failed."""
        if self.left_out:
            print(f"left out for want of time: {', '.join(self.left_out)}")
        if self.failed:
            raise SystemExit("; ".join(self.failed))

    def _one(self, case: Case, variant: Variant) -> Variant:
        """The variant whose single GPU has the same optimizer and nothing spread."""
        name = CHANGES[variant].get("optim.name", case.training.optim.name)
        if name == case.training.optim.name:
            return "ddp"
        return "muon" if name == "muon" else "adamw"

    def _run(
        self, case: Case, name: str, ranks: int, changes: Mapping[str, Any], log_every: int, enough: Any
    ) -> list[dict[str, Any]] | None:
        left = self.options.budget_s - (time.monotonic() - self.began)
        # The first run compiles, and tells too much of those after it.
        overhead = max(self.took_s[1:], default=0.6 * sum(self.took_s))
        if self.took_s and left < overhead + self.options.seconds:
            self.left_out.append(f"{name} ({left:.0f} s were left)")
            return None
        began = time.monotonic()
        try:
            lines = self.trainer.run(case, name, ranks, changes, log_every=log_every, enough=enough)
        except RunError as error:
            print(f"  {name}: FAILED, {error}", flush=True)
            self.failed.append(f"{name} failed")
            return None
        self.took_s.append(time.monotonic() - began - (0 if log_every == 1 else self.options.seconds))
        return lines

    def _write(self, rows: Mapping[str, tuple[float, str]]) -> None:
        if self.options.out is None:
            return
        cuda = self.options.device == "cuda"
        prefix, shown = ("scaling", torch.cuda.get_device_name()) if cuda else ("scaling.cpu", cpu_name())
        add_rows(
            self.options.out,
            {f"{prefix}.{name}": row for name, row in rows.items()},
            device=shown,
            command=self.command,
            packages=("torch", "accelerate"),
        )


if __name__ == "__main__":
    try:
        main(sys.argv[1:], "python tools/bench/scaling.py")
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
