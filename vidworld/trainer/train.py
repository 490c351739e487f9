"""`vidworld train CONFIG.yaml [--out RUN]` and `vidworld train RUN --resume`: a tokenizer or a world."""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from vidworld.config import parse, to_mapping
from vidworld.data.manifest import Manifest
from vidworld.data.shards import ShardDataset
from vidworld.errors import CheckpointError, ConfigError, DataError
from vidworld.model.inputs import FrameShape
from vidworld.tokenizers.base import check_size, num_latent_frames, to_unit_range
from vidworld.tokenizers.conv import ConvTokenizer
from vidworld.tokenizers.store import FOLDER, load_tokenizer, save_tokenizer
from vidworld.trainer.config import TokenizerTraining, Training, WorldTraining, absolute, read_training
from vidworld.trainer.ema import EMA
from vidworld.trainer.encode import encode_dataset
from vidworld.trainer.engine import autocast_of, build_engine, uses_compile
from vidworld.trainer.feed import clip_batches, clip_feed, open_dataset
from vidworld.trainer.logging import RunLog
from vidworld.trainer.loop import Feed, Look, Loop
from vidworld.trainer.run import CONFIG, open_run
from vidworld.trainer.samples import FaithfulnessAlarm, TokenizerSamples, Validation, WorldSamples
from vidworld.trainer.tasks import Task, TokenizerTask, WorldTask, pixels
from vidworld.types import Batch
from vidworld.world.build import build, load_weights
from vidworld.world.load import find
from vidworld.world.spec import FILE_NAME, SamplerConfig, WorldSpec

STATISTICS_EPISODES, STATISTICS_FRAMES = 64, 32


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """Train a tokenizer on video shards."""

    config: tyro.conf.Positional[Path]
    """YAML of the run, or the directory of one."""
    out: Path | None = None
    """Run directory; by default runs/<name of the YAML>."""
    resume: bool = False
    """Go on from the newest checkpoint, if there is one."""
    overwrite: bool = False
    """Train anew in a run that is here already."""
    training: Annotated[TokenizerTraining, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class WorldOptions:
    """Train an action-conditioned world model on video or latent shards."""

    config: tyro.conf.Positional[Path]
    """YAML of the run, or the directory of one."""
    out: Path | None = None
    """Run directory; by default runs/<name of the YAML>."""
    resume: bool = False
    """Go on from the newest checkpoint, if there is one."""
    overwrite: bool = False
    """Train anew in a run that is here already."""
    training: Annotated[WorldTraining, tyro.conf.arg(name="")]


def main(arguments: Sequence[str], prog: str) -> None:
    """The command `vidworld train`."""
    if not arguments or arguments[0].startswith("-"):
        if arguments and arguments[0] in ("-h", "--help"):
            parse(WorldOptions, arguments, prog=f"{prog} CONFIG.yaml")
        raise ConfigError("first argument", fix=f"give a YAML or a run: {prog} CONFIG.yaml [--out RUN] ...")
    path = Path(arguments[0])
    is_run = (path / CONFIG).is_file()
    if path.is_dir() and not is_run:
        raise ConfigError("run to go on with", got=path, expected=f"a directory with {CONFIG}")
    training = read_training(path / CONFIG if is_run else path)
    out = path if is_run else None
    match training:
        case TokenizerTraining():
            default = TokenizerOptions(config=path, out=out, training=training)
            options = parse(TokenizerOptions, arguments, prog=prog, default=default)
        case WorldTraining():
            default = WorldOptions(config=path, out=out, training=training)
            options = parse(WorldOptions, arguments, prog=prog, default=default)
    run = options.out or Path("runs") / path.stem
    train(options.training, run, resume=options.resume, overwrite=options.overwrite)
    if _rank() == 0:
        print(f"{run}: done; {_next_command(options.training, run)}")


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
    with (
        held,
        RunLog(
            run, wandb=training.wandb, config=to_mapping(training), active=first, progress_bar=progress_bar
        ) as log,
    ):
        # Initial weights only: noise and order have seeds of their own.
        torch.manual_seed(training.seed)
        match training:
            case TokenizerTraining():
                _train_tokenizer(training, run, log, resume=resume)
            case WorldTraining():
                _train_world(training, run, log, resume=resume)


def _train_tokenizer(training: TokenizerTraining, run: Path, log: RunLog, *, resume: bool) -> None:
    dataset = open_dataset(training.data, "video")
    tokenizer = ConvTokenizer(training.tokenizer)
    check_size(dataset.manifest.height, dataset.manifest.width, tokenizer.size_multiple)
    trial = _Trial(training, TokenizerTask(tokenizer), run, log)
    feed = clip_feed(dataset, training.loader, seed=training.seed, **trial.layout)
    held_out = _held_out(training, dataset, log)
    looks = [Look(training.look.validate_every, Validation(held_out, trial.autocast))]
    looks.append(
        Look(training.look.sample_every, TokenizerSamples(held_out, run / "samples", trial.autocast))
    )
    loop = trial.loop(feed, looks, {"kind": training.kind}, resume=resume)
    loop.fit()
    if trial.engine.rank == 0:
        averaged = loop.ema.module.net
        with torch.no_grad():
            averaged.measure_statistics(_statistics_videos(dataset, trial.engine.device))
            psnr = _reconstruction_psnr(averaged, held_out, trial.engine.device)
        digest = save_tokenizer(averaged, run / FOLDER)
        log.write({"step": loop.clock.step, "event": "tokenizer", "held_out_psnr": psnr, "digest": digest})
        log.say(f"tokenizer {digest}: {psnr:.2f} dB PSNR on held-out frames")
    trial.engine.barrier()


def _train_world(training: WorldTraining, run: Path, log: RunLog, *, resume: bool) -> None:
    dataset = ShardDataset.open(training.data)
    tokenizer = load_tokenizer(training.tokenizer)
    assert isinstance(tokenizer, ConvTokenizer)
    _check_latents(dataset.manifest, tokenizer, training.data)
    spec = _world_spec(training, dataset.manifest, tokenizer)
    world = build(spec, tokenizer)
    if training.init is not None:
        load_weights(world.model, find(training.init).weights)
    task = WorldTask(
        world.model,
        world.normalizer,
        training.objective,
        action_dropout=training.action_dropout,
        clip_dropout=training.clip_dropout,
    )
    trial = _Trial(training, task, run, log)
    if trial.engine.rank == 0:
        tokenizer.to(trial.engine.device)
    latents = _latents(training, dataset, tokenizer, run, trial)
    feed = clip_feed(
        latents,
        training.loader,
        seed=training.seed,
        long_clip_frames=training.long_clip_frames,
        long_clip_fraction=training.long_clip_fraction,
        **trial.layout,
    )
    held_out = _held_out(training, latents, log)
    look = training.look
    looks = [
        Look(look.validate_every, Validation(held_out, trial.autocast)),
        Look(look.sample_every, WorldSamples(dataset, tokenizer, spec, look, run / "samples")),
    ]
    identity = {"kind": training.kind, "tokenizer": tokenizer.digest}
    loop = trial.loop(feed, looks, identity, resume=resume)
    loop.looks.append(
        Look(
            look.validate_every,
            FaithfulnessAlarm(held_out, spec, look, lambda: loop.clock.progress, log.say, trial.autocast),
        )
    )
    if trial.engine.rank == 0:
        _refuse_other_world(run, spec, resume=resume)
        spec.write(run)
        save_tokenizer(tokenizer, run / FOLDER)
    loop.fit()


class _Trial:
    """The parts that both kinds of training put together alike."""

    def __init__(self, training: Training, task: Task[Any], run: Path, log: RunLog) -> None:
        self.training, self.task, self.run, self.log = training, task, run, log
        config = training.engine
        # Before compiling and wrapping: a plain copy that can be run by itself.
        self.ema = EMA(task, training.loop.ema_decay)
        if uses_compile(config):
            task.compile_parts()
        self.engine = build_engine(
            task,
            config,
            training.optim,
            matrices=task.matrices(),
            micro_batch_size=max(1, training.loader.batch_size // (config.accumulation * _world_size())),
        )
        self.autocast: Callable[[], torch.autocast] = autocast_of(config, self.engine.device)
        self.layout = {
            "rank": self.engine.rank,
            "world_size": self.engine.world_size,
            "accumulation": config.accumulation,
        }

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
            log=self.log,
            looks=looks,
            identity=identity,
        )
        saved = loop.store.newest() if resume else None
        if saved is not None:
            loop.resume(saved)
        if self.engine.rank == 0:
            self.log.drop_after(loop.clock.step)
        parameters = sum(parameter.numel() for parameter in self.task.net.parameters())
        begin = f"goes on from step {loop.clock.step}" if saved is not None else "starts"
        self.log.say(
            f"{training.kind} {begin}: {parameters / 1e6:.1f}M parameters on {self.engine.world_size} x "
            f"{self.engine.device.type}, data {training.data}, run {self.run}"
        )
        return loop


def _world_spec(training: WorldTraining, manifest: Manifest, tokenizer: ConvTokenizer) -> WorldSpec:
    """What `world.json` says."""
    check_size(manifest.height, manifest.width, tokenizer.size_multiple)
    sampler = training.sampler
    return WorldSpec(
        model=training.model,
        shape=FrameShape.from_contracts(
            manifest.contracts,
            views=len(manifest.views),
            channels=tokenizer.latent_channels,
            height=manifest.height // tokenizer.spatial_stride,
            width=manifest.width // tokenizer.spatial_stride,
            actions_per_frame=tokenizer.time_stride,
        ),
        views=manifest.views,
        height=manifest.height,
        width=manifest.width,
        fps=manifest.fps,
        contracts=manifest.contracts,
        sampler=SamplerConfig(
            steps=sampler.steps,
            method=sampler.method,
            finest_steps=training.objective.finest_steps,
            context_noise=sampler.context_noise,
            window=num_latent_frames(training.loader.clip_frames, tokenizer.time_stride),
            sink=sampler.sink,
            guidance=sampler.guidance,
        ),
        tokenizer_digest=tokenizer.digest,
        dataset_digest=manifest.digest,
    )


def _check_latents(manifest: Manifest, tokenizer: ConvTokenizer, where: Path) -> None:
    """Refuse latents of another tokenizer."""
    made_by = (manifest.tokenizer or {}).get("digest", tokenizer.digest)
    if made_by != tokenizer.digest:
        raise DataError(
            "tokenizer of the latents",
            where=where,
            got=made_by,
            expected=tokenizer.digest,
            fix="give the tokenizer that encoded them, or encode the video again",
        )


def _latents(
    training: WorldTraining, dataset: ShardDataset, tokenizer: ConvTokenizer, run: Path, trial: _Trial
) -> ShardDataset:
    """The latents to train on; those of a video dataset are made by the first rank, once."""
    if dataset.manifest.kind == "latents":
        return dataset
    out = training.latents or run / "latents"
    if trial.engine.rank == 0:
        encode_dataset(training.data, tokenizer, out)
    trial.engine.barrier()
    return open_dataset(out, "latents")


def _held_out(training: Training, dataset: ShardDataset, log: RunLog) -> list[Batch]:
    """Batches of the validation split, or of the training split where it has no clip."""
    look = training.look
    config = type(training.loader)(
        clip_frames=training.loader.clip_frames, batch_size=look.validate_clips, workers=0
    )
    try:
        return clip_batches(dataset, "val", config, look.validate_batches)
    except DataError as error:
        warnings.warn(f"validation reads training clips: {error}", stacklevel=2)
        return clip_batches(dataset, "train", config, look.validate_batches)


def _statistics_videos(dataset: ShardDataset, device: torch.device) -> Iterator[torch.Tensor]:
    """Frames spread over the training split, one view at a time [1, T, 3, H, W] in [-1, 1]."""
    samples = dataset.manifest.samples("train")
    for sample in samples[:: -(-len(samples) // STATISTICS_EPISODES)]:
        video = dataset.read(sample.key).video
        assert video is not None
        for frames_THWC in video.values():
            spread = frames_THWC[:: -(-len(frames_THWC) // STATISTICS_FRAMES)]
            yield to_unit_range(torch.from_numpy(spread.copy()).to(device).movedim(-1, -3)[None])


def _reconstruction_psnr(tokenizer: ConvTokenizer, batches: Sequence[Batch], device: torch.device) -> float:
    """Mean PSNR in dB of held-out pictures through encode and decode, clamped as when shown."""
    per_picture = []
    for batch in batches:
        video_NTCHW = pixels(batch).to(device)
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
            return f"next: vidworld eval {run} {training.data}, or vidworld rollout {run}"


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _rank() -> int:
    """Rank of this process before any process group is made."""
    return int(os.environ.get("RANK", "0"))
