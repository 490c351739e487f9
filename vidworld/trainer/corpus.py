"""The data of a run, one dataset or a mixture: opened, encoded, held out, and described to the world."""

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from vidworld.contract import ActionContract
from vidworld.data.mixture import Mixture, layout_of
from vidworld.data.shards import ShardDataset
from vidworld.errors import ConfigError, DataError
from vidworld.model.inputs import FrameShape
from vidworld.tokenizers.base import Tokenizer, check_size, num_latent_frames, to_unit_range
from vidworld.trainer.config import Training, WorldTraining
from vidworld.trainer.encode import encode_dataset
from vidworld.trainer.feed import clip_batches, part_batches
from vidworld.types import Batch, Layout
from vidworld.world.spec import SamplerConfig, WorldSpec

Corpus = ShardDataset | Mixture

STATISTICS_EPISODES, STATISTICS_FRAMES = 64, 32
MOST_PROCESSES = 8
"""That encode side by side before a training."""


def open_corpus(training: Training, kind: str | None = None) -> Corpus:
    """Open what `data` or `mix` names; `kind` refuses datasets of another one."""
    datasets = [ShardDataset.open(path) for path in training.datasets]
    for dataset in datasets:
        if kind not in (None, dataset.manifest.kind):
            raise DataError(
                "kind of dataset", where=dataset.directory, got=dataset.manifest.kind, expected=kind
            )
    if training.mix:
        return Mixture.of(datasets, [part.weight for part in training.mix])
    return datasets[0]


def named_datasets(corpus: Corpus) -> dict[str, ShardDataset]:
    """Label -> dataset; the label of the only one is empty."""
    if isinstance(corpus, Mixture):
        return {part.label: part.dataset for part in corpus.parts}
    return {"": corpus}


def robots(corpus: Corpus) -> tuple[tuple[ActionContract, ...], tuple[Layout, ...]]:
    """Contracts, in the order that batches count them, and how each embodiment sees."""
    if isinstance(corpus, Mixture):
        return corpus.contracts, corpus.layouts
    contracts = corpus.manifest.contracts
    return contracts, (layout_of(corpus.manifest),) * len(contracts)


def describe(corpus: Corpus) -> str:
    """The data in one line."""
    return f"mix of {corpus.describe()}" if isinstance(corpus, Mixture) else str(corpus.directory)


def world_spec(
    training: WorldTraining, corpus: Corpus, tokenizer: Tokenizer, known: WorldSpec | None = None
) -> WorldSpec:
    """What `world.json` says.

    known: the world that this one starts from. Its embodiments that are not in the data stay, after those
    that are. Raises ContractError or ConfigError where an embodiment of both has another contract or other
    pictures.
    """
    contracts, layouts = robots(corpus)
    if known is not None:
        contracts, layouts = _with_known(contracts, layouts, known, tokenizer, training.init)
        own, now = known.sampler.start_noise, training.sampler.start_noise
        if training.objective.kind == "energy" and own < now:
            warnings.warn(
                f"{training.init} was trained with sampler.start_noise {own:g} and has never seen the noise "
                f"that frames will now start from (sampler.start_noise {now:g})",
                stacklevel=2,
            )
    for layout in layouts:
        check_size(layout.height, layout.width, tokenizer.size_multiple)
    stride = tokenizer.spatial_stride
    grids = [(len(layout.views), layout.height // stride, layout.width // stride) for layout in layouts]
    differ = len(set(layouts)) > 1
    height, width = max(layout.height for layout in layouts), max(layout.width for layout in layouts)
    views = max((layout.views for layout in layouts), key=len)
    return WorldSpec(
        model=training.model,
        shape=FrameShape.from_contracts(
            contracts,
            views=len(views),
            channels=tokenizer.latent_channels,
            height=height // stride,
            width=width // stride,
            actions_per_frame=tokenizer.time_stride,
            grids=grids if len(set(grids)) > 1 else (),
        ),
        views=views,
        height=height,
        width=width,
        fps=layouts[0].fps,
        contracts=contracts,
        sampler=SamplerConfig(
            **vars(training.sampler),
            finest_steps=training.objective.finest_steps,
            one_step=training.objective.kind != "shortcut",
            window=num_latent_frames(training.loader.clip_frames, tokenizer.time_stride),
        ),
        tokenizer_digest=tokenizer.digest,
        dataset_digest=corpus.digest if isinstance(corpus, Mixture) else corpus.manifest.digest,
        layouts=layouts if differ else (),
    )


def _with_known(
    contracts: tuple[ActionContract, ...],
    layouts: tuple[Layout, ...],
    known: WorldSpec,
    tokenizer: Tokenizer,
    where: Path | None,
) -> tuple[tuple[ActionContract, ...], tuple[Layout, ...]]:
    """Embodiments of the data, then those that only the world before knew; its statistics are kept."""
    if known.tokenizer_digest not in ("", tokenizer.digest):
        raise ConfigError(
            "tokenizer of the world to start from",
            where=where,
            got=known.tokenizer_digest,
            expected=f"{tokenizer.digest}, as given",
            fix="train on with the tokenizer of that world",
        )
    here = {
        contract.embodiment: (contract, layout) for contract, layout in zip(contracts, layouts, strict=True)
    }
    for contract in known.contracts:
        name, layout = contract.embodiment, known.layout(contract.embodiment)
        mine, seen = here.get(name, (contract, layout))
        contract.require_same_robot(mine, where=where)
        # Its weights fit numbers that were scaled by its own statistics, whatever the new data's are.
        here[name] = (contract, layout)
        if seen != layout:
            raise ConfigError(
                f"views, size or rate of embodiment {name!r}", where=where, got=seen, expected=layout
            )
    return tuple(one for one, _ in here.values()), tuple(layout for _, layout in here.values())


def check_latents(corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Refuse latents of another tokenizer."""
    for dataset in named_datasets(corpus).values():
        made_by = (dataset.manifest.tokenizer or {}).get("digest", tokenizer.digest)
        if made_by != tokenizer.digest:
            raise DataError(
                "tokenizer of the latents",
                where=dataset.directory,
                got=made_by,
                expected=tokenizer.digest,
                fix="give the tokenizer that encoded them, or encode the video again",
            )


def latent_folders(corpus: Corpus, out: Path) -> dict[str, Path]:
    """Where the latents of each video dataset go, by its label."""
    return {label: out / label if label else out for label in named_datasets(corpus)}


def encode_corpus(corpus: Corpus, tokenizer: Tokenizer, out: Path) -> None:
    """Make the latents of video datasets, once; see `encode_dataset`. In several processes on a GPU."""
    processes = 1
    if isinstance(tokenizer, nn.Module) and next(tokenizer.parameters()).device.type == "cuda":
        # Decoding video is what it waits for, and a process decodes on one core.
        processes = min(MOST_PROCESSES, max(1, (os.cpu_count() or 1) // 2))
    for label, dataset in named_datasets(corpus).items():
        if dataset.manifest.kind == "video":
            encode_dataset(
                dataset.directory, tokenizer, latent_folders(corpus, out)[label], processes=processes
            )


def open_latents(corpus: Corpus, out: Path) -> Corpus:
    """The same data as latents: those that `encode_corpus` made, or the very datasets."""
    folders = latent_folders(corpus, out)

    def latent(label: str, dataset: ShardDataset) -> ShardDataset:
        return dataset if dataset.manifest.kind == "latents" else ShardDataset.open(folders[label])

    if isinstance(corpus, Mixture):
        return Mixture(tuple(replace(p, dataset=latent(p.label, p.dataset)) for p in corpus.parts))
    return latent("", corpus)


def held_out(training: Training, corpus: Corpus) -> dict[str, list[Batch]]:
    """Batches of the validation split by embodiment; of the training split where a dataset has no clip there.

    Of a mixture, each dataset gives as many batches.
    """
    look = training.look
    config = type(training.loader)(
        clip_frames=training.loader.clip_frames,
        clip_stride=training.loader.clip_stride,  # with a time stride it must be a multiple
        batch_size=look.validate_clips,
        workers=0,
    )

    def batches(split: str, label: str) -> list[Batch]:
        if isinstance(corpus, Mixture):
            return part_batches(corpus, label, split, config, look.validate_batches)
        return clip_batches(corpus, split, config, look.validate_batches)

    found: list[Batch] = []
    for label in named_datasets(corpus):
        try:
            found += batches("val", label)
        except DataError as error:
            warnings.warn(f"validation reads training clips: {error}", stacklevel=2)
            found += batches("train", label)
    return by_embodiment(found, [contract.embodiment for contract in robots(corpus)[0]])


def by_embodiment(batches: Sequence[Batch], names: Sequence[str]) -> dict[str, list[Batch]]:
    """The clips of each embodiment, still in their batches; embodiments without a clip are left out."""
    if len(names) == 1:
        return {names[0]: list(batches)}
    found: dict[str, list[Batch]] = {}
    for index, name in enumerate(names):
        for batch in batches:
            if rows := [row for row, one in enumerate(batch.embodiment_B.tolist()) if one == index]:
                found.setdefault(name, []).append(batch.rows(rows))
    return found


def statistics_videos(corpus: Corpus, device: torch.device) -> Iterator[torch.Tensor]:
    """Frames spread over the training split, one view at a time [1, T, 3, H, W] in [-1, 1]."""
    for dataset in named_datasets(corpus).values():
        samples = dataset.manifest.samples("train")
        for sample in samples[:: -(-len(samples) // STATISTICS_EPISODES)]:
            video = dataset.read(sample.key).video
            assert video is not None
            for frames_THWC in video.values():
                spread = frames_THWC[:: -(-len(frames_THWC) // STATISTICS_FRAMES)]
                yield to_unit_range(torch.from_numpy(spread.copy()).to(device).movedim(-1, -3)[None])
