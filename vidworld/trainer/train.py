"""`vidworld train CONFIG.yaml [--out RUN]` and `vidworld train RUN --resume`: a tokenizer or a world."""

import contextlib
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor, nn

from vidworld.config import parse, to_mapping
from vidworld.data.loader import make_loader
from vidworld.errors import CheckpointError, ConfigError
from vidworld.files import require_local
from vidworld.model.embodiments import carry_over
from vidworld.model.merge import with_fresh_parts
from vidworld.model.sequence import sequence_groups
from vidworld.tokenizers.base import check_size
from vidworld.tokenizers.conv import ConvTokenizer
from vidworld.tokenizers.pretrained import require_statistics
from vidworld.tokenizers.store import FOLDER, load_tokenizer, save_tokenizer
from vidworld.trainer.config import TokenizerTraining, Training, WorldTraining, absolute, read_training
from vidworld.trainer.corpus import (
    check_latents,
    encode_corpus,
    held_out,
    named_datasets,
    open_corpus,
    open_latents,
    robots,
    statistics_videos,
    world_spec,
)
from vidworld.trainer.ema import EMA
from vidworld.trainer.engine import autocast_of, build_engine, uses_compile
from vidworld.trainer.feed import clip_feed, clip_kinds
from vidworld.trainer.fusing import choose_fused, require_fusable
from vidworld.trainer.heartbeat import Heartbeat
from vidworld.trainer.logging import RunLog
from vidworld.trainer.loop import Feed, Look, Loop
from vidworld.trainer.run import CONFIG, open_run
from vidworld.trainer.samples import FaithfulnessAlarm, TokenizerSamples, Validation, WorldSamples
from vidworld.trainer.supervise import supervise_command
from vidworld.trainer.tasks import Task, TokenizerTask, WorldTask, pictures
from vidworld.trainer.upload import fetch_newest
from vidworld.trainer.warm_up import clip_shapes, prepare_kernels, warm_up_tokenizer
from vidworld.types import Batch, Layout
from vidworld.world.build import build, load_weights
from vidworld.world.load import find
from vidworld.world.spec import FILE_NAME, WorldSpec


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a run is, and whether it is new."""

    config: tyro.conf.Positional[Path]
    """YAML of the run, or the directory of one."""
    out: Path | None = None
    """Run directory; by default runs/<name of the YAML>."""
    resume: bool = False
    """Go on from the newest checkpoint, if there is one."""
    overwrite: bool = False
    """Train anew in a run that is here already."""
    max_restarts: int = 0
    """Start again from the newest checkpoint when the training dies, so many times at most; it is given up
    after 3 restarts without a newer checkpoint."""


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions(RunOptions):
    """Train a tokenizer on video shards."""

    training: Annotated[TokenizerTraining, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class WorldOptions(RunOptions):
    """Train an action-conditioned world model on video or latent shards."""

    training: Annotated[WorldTraining, tyro.conf.arg(name="")]


def main(arguments: Sequence[str], prog: str) -> None:
    """The command `vidworld train`."""
    path, out, training = named_training(arguments, prog, WorldOptions, "[--out RUN] ...")
    match training:
        case TokenizerTraining():
            default = TokenizerOptions(config=path, out=out, training=training)
            options = parse(TokenizerOptions, arguments, prog=prog, default=default)
        case WorldTraining():
            default = WorldOptions(config=path, out=out, training=training)
            options = parse(WorldOptions, arguments, prog=prog, default=default)
    run = require_local(options.out or Path("runs") / path.stem, "--out")
    if options.max_restarts != 0:
        supervise_command(arguments, run, options.max_restarts)
        return
    train(options.training, run, resume=options.resume, overwrite=options.overwrite)
    if _rank() == 0:
        print(f"{run}: done; {_next_command(options.training, run)}")


def named_training(
    arguments: Sequence[str], prog: str, options: type, usage: str
) -> tuple[Path, Path | None, Training]:
    """The first argument (a YAML, or a run), the run directory if it is one, and the training that it holds.

    With --help instead, prints that of `options` and leaves. Raises ConfigError when it is neither.
    """
    if not arguments or arguments[0].startswith("-"):
        if arguments and arguments[0] in ("-h", "--help"):
            parse(options, arguments, prog=f"{prog} CONFIG.yaml")
        raise ConfigError("first argument", fix=f"give a YAML or a run: {prog} CONFIG.yaml {usage}")
    path = Path(arguments[0])
    is_run = (path / CONFIG).is_file()
    if path.is_dir() and not is_run:
        raise ConfigError("run to go on with", got=path, expected=f"a directory with {CONFIG}")
    return path, path if is_run else None, read_training(path / CONFIG if is_run else path)


def train(
    training: Training,
    run: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress_bar: bool = True,
) -> None:
    """Train what `training` says in the directory `run`.

    Raises UserError for what is wrong with settings or data, PreemptedError after a signal (a checkpoint was
    saved), DivergedError when too many steps in a row were not finite.
    """
    training = absolute(training)
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    first = _rank() == 0
    held = open_run(run, training, resume=resume, overwrite=overwrite) if first else contextlib.nullcontext()
    loop = training.loop
    heart = Heartbeat(run, rank=_rank(), world_size=_world_size(), hang_s=loop.hang_s, silent_s=loop.silent_s)
    with (
        held as directory,
        heart,
        RunLog(
            run, wandb=training.wandb, config=to_mapping(training), active=first, progress_bar=progress_bar
        ) as log,
    ):
        # Initial weights only: noise and order have seeds of their own.
        torch.manual_seed(training.seed)
        begin = directory.begin if directory is not None else lambda: None
        match training:
            case TokenizerTraining():
                _train_tokenizer(training, run, log, heart, begin, resume=resume)
            case WorldTraining():
                _train_world(training, run, log, heart, begin, resume=resume)


Begin = Callable[[], None]
"""Called when nothing is left to be refused: from here on the run directory holds this run."""


def _train_tokenizer(
    training: TokenizerTraining, run: Path, log: RunLog, heart: Heartbeat, begin: Begin, *, resume: bool
) -> None:
    corpus = open_corpus(training, "video")
    _, layouts = robots(corpus)
    tokenizer = ConvTokenizer(training.tokenizer)
    for layout in layouts:
        check_size(layout.height, layout.width, tokenizer.size_multiple)
    task = TokenizerTask(tokenizer, layouts)
    trial = _Trial(training, task, run, log, heart)
    feed = clip_feed(corpus, training.loader, seed=training.seed, **trial.layout)
    unseen = held_out(training, corpus)
    looks = [Look(training.look.validate_every, Validation(unseen, trial.autocast))]
    looks.append(Look(training.look.sample_every, TokenizerSamples(unseen, run / "samples", trial.autocast)))
    loop = trial.loop(feed, looks, {"kind": training.kind}, resume=resume)
    begin()
    config = training.engine
    # Pictures of several sizes are compiled for any number of them, at the first that come.
    if uses_compile(config) and not task.layouts and config.strategy in ("ddp", "zero1", "zero2"):
        (shape,) = clip_shapes([training.loader], trial.parts)
        took = warm_up_tokenizer(task, shape, layouts[0], trial.engine.device, trial.autocast)
        log.say(f"compiled in {took:.0f} s")
    loop.fit()
    if trial.engine.rank == 0:
        averaged = loop.ema.module.net
        with torch.no_grad():
            averaged.measure_statistics(statistics_videos(corpus, trial.engine.device))
            psnr = _reconstruction_psnr(averaged, layouts, unseen, trial.engine.device)
        digest = save_tokenizer(averaged, run / FOLDER)
        log.write({"step": loop.clock.step, "event": "tokenizer", "held_out_psnr": psnr, "digest": digest})
        log.say(f"tokenizer {digest}: {psnr:.2f} dB PSNR on held-out frames")
    trial.engine.barrier()


def _train_world(
    training: WorldTraining, run: Path, log: RunLog, heart: Heartbeat, begin: Begin, *, resume: bool
) -> None:
    corpus = open_corpus(training)
    tokenizer = load_tokenizer(training.tokenizer)
    assert isinstance(tokenizer, nn.Module)
    require_statistics(tokenizer, training.tokenizer)
    check_latents(corpus, tokenizer)
    known = None if training.init is None else WorldSpec.read(find(training.init).directory)
    spec = world_spec(training, corpus, tokenizer, known)
    world = build(spec, tokenizer)
    if training.init is not None and known is not None:
        before = known.robots

        def adapt(weights: dict[str, Tensor]) -> dict[str, Tensor]:
            return with_fresh_parts(carry_over(weights, before, spec.robots), world.model)

        load_weights(world.model, find(training.init).weights, adapt=adapt)
    task = WorldTask(
        world.model,
        world.normalizer,
        training.objective,
        action_dropout=training.action_dropout,
        clip_dropout=training.clip_dropout,
        temperature=training.sampler.temperature,
        start_noise=training.sampler.start_noise,
    )
    trial = _Trial(training, task, run, log, heart)
    require_fusable(training.engine, trial.engine.device)
    if trial.engine.rank == 0:
        tokenizer.to(trial.engine.device)
    folder = training.latents or run / "latents"
    make_loader(corpus, "train", training.loader, seed=training.seed)  # refuses before the long work
    if trial.engine.rank == 0:
        encode_corpus(corpus, tokenizer, folder)
    trial.engine.barrier()
    latents = open_latents(corpus, folder)
    feed = clip_feed(
        latents,
        training.loader,
        seed=training.seed,
        long_clip_frames=training.long_clip_frames,
        long_clip_fraction=training.long_clip_fraction,
        **trial.layout,
    )
    unseen = held_out(training, latents)
    look = training.look
    looks = [Look(look.validate_every, Validation(unseen, trial.autocast))]
    for label, dataset in named_datasets(corpus).items():
        samples = WorldSamples(dataset, tokenizer, spec, look, run / "samples", label)
        looks.append(Look(look.sample_every, samples))
    identity = {"kind": training.kind, "tokenizer": tokenizer.digest}
    loop = trial.loop(feed, looks, identity, resume=resume)
    loop.looks.append(
        Look(
            look.validate_every,
            FaithfulnessAlarm(unseen, spec, look, lambda: loop.clock.progress, log.say, trial.autocast),
        )
    )
    if trial.engine.rank == 0:
        _refuse_other_world(run, spec, resume=resume)
        spec.write(run)
        save_tokenizer(tokenizer, run / FOLDER)
    kinds = clip_kinds(training.loader, training.long_clip_frames, training.long_clip_fraction, trial.parts)
    shapes = clip_shapes(list(kinds.values()), trial.parts)
    device, ranks = trial.engine.device, trial.engine.world_size
    said = choose_fused(task, training.engine, shapes[0], device, trial.autocast, world_size=ranks)
    begin()
    if said is not None:
        log.say(said)
    # Where weights are cut across ranks, a pass outside the engine has none to run on.
    compiled = uses_compile(training.engine) and training.engine.strategy in ("ddp", "zero1", "zero2")
    log.say(prepare_kernels(task, shapes, device, trial.autocast, compiled))
    loop.fit()


class _Trial:
    """The parts that both kinds of training put together alike."""

    def __init__(self, training: Training, task: Task[Any], run: Path, log: RunLog, heart: Heartbeat) -> None:
        self.training, self.task, self.run, self.log, self.heart = training, task, run, log, heart
        config = training.engine
        # Before compiling and wrapping: a plain copy that can be run by itself.
        self.ema = EMA(task, training.loop.ema_decay)
        if config.checkpoint_activations:
            task.checkpoint_parts()
        if uses_compile(config):
            task.compile_parts()
        self.engine = build_engine(
            task,
            config,
            training.optim,
            matrices=task.matrices(),
            micro_batch_size=max(1, training.loader.batch_size // self.parts),
        )
        if config.sequence_parallel > 1:
            task.share_clips(sequence_groups(config.sequence_parallel))
        self.autocast: Callable[[], torch.autocast] = autocast_of(config, self.engine.device)
        self.layout = {
            "rank": self.engine.rank // config.sequence_parallel,
            "world_size": self.engine.world_size // config.sequence_parallel,
            "accumulation": config.accumulation,
        }

    @property
    def parts(self) -> int:
        """Micro-batches of a step, over all ranks that have clips of their own."""
        config = self.training.engine
        return config.accumulation * max(1, _world_size() // config.sequence_parallel)

    def loop(self, feed: Feed, looks: list[Look], identity: dict[str, Any], *, resume: bool) -> Loop:
        """The loop, standing at the newest checkpoint if it is to resume."""
        training = self.training
        loop = Loop(
            self.task,
            self.ema,
            feed,
            self.engine,
            training.optim,
            training.loop,
            run=self.run,
            seed=training.seed,
            accumulation=training.engine.accumulation,
            sequence_parallel=training.engine.sequence_parallel,
            log=self.log,
            looks=looks,
            identity=identity,
            heart=self.heart,
        )
        if resume and training.loop.upload:
            if self.engine.rank == 0:
                fetch_newest(training.loop.upload, loop.store.directory, say=self.log.say)
            self.engine.barrier()
        saved = loop.store.newest() if resume else None
        if saved is not None:
            loop.resume(saved)
        if self.engine.rank == 0:
            self.log.drop_after(loop.clock.step)
        parameters = sum(parameter.numel() for parameter in self.task.net.parameters())
        begin = f"goes on from step {loop.clock.step}" if saved is not None else "starts"
        self.log.say(
            f"{training.kind} {begin}: {parameters / 1e6:.1f}M parameters on {self.engine.world_size} x "
            f"{self.engine.device.type}, data {', '.join(map(str, training.datasets))}, run {self.run}"
        )
        return loop


def _reconstruction_psnr(
    tokenizer: ConvTokenizer,
    layouts: Sequence[Layout],
    batches: Mapping[str, Sequence[Batch]],
    device: torch.device,
) -> float:
    """Mean PSNR in dB of held-out pictures through encode and decode, clamped as when shown."""
    per_picture = []
    for batch in itertools.chain.from_iterable(batches.values()):
        for video_NTCHW in pictures(batch.to(device), layouts):
            decoded_NTCHW = tokenizer.decode(tokenizer.encode(video_NTCHW)).clamp(-1, 1)
            squared = (decoded_NTCHW - video_NTCHW).square().flatten(2).mean(2)
            per_picture.append(10 * torch.log10(4 / squared.clamp(min=1e-10)).flatten())
    return float(torch.cat(per_picture).mean())


def _refuse_other_world(run: Path, spec: WorldSpec, *, resume: bool) -> None:
    """A resumed run keeps its world: contracts, views, sizes and architecture."""
    if not resume or not (run / FILE_NAME).is_file():
        return
    before = WorldSpec.read(run)
    for contract, stored in zip(spec.contracts, before.contracts, strict=False):
        stored.require_equal(contract, where=run)
    if before.digest != spec.digest:
        raise CheckpointError(
            "world of the run to resume", where=run, got=spec.digest, expected=before.digest
        )


def _next_command(training: Training, run: Path) -> str:
    match training:
        case TokenizerTraining():
            return f"next: set `tokenizer: {run}` in a world config, or run vidworld encode"
        case WorldTraining():
            return f"next: vidworld eval {run} {training.datasets[0]}, or vidworld rollout {run}"


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _rank() -> int:
    """Rank of this process before any process group is made."""
    return int(os.environ.get("RANK", "0"))
