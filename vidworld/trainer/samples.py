"""What is seen of a run while it trains: validation loss, the action-faithfulness alarm, sample clips.

All with the averaged weights, on batches and episodes that stay the same, so that numbers compare.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vidworld import media
from vidworld.data.shards import ShardDataset
from vidworld.errors import VidworldError
from vidworld.model.merge import first_member
from vidworld.tokenizers.base import Tokenizer, to_pixels
from vidworld.trainer.config import LookConfig
from vidworld.trainer.loop import noise_generator
from vidworld.trainer.tasks import Moment, Task, TokenizerTask, WorldTask, pictures
from vidworld.types import Batch
from vidworld.world.build import narrow
from vidworld.world.faithfulness import action_faithfulness
from vidworld.world.prompt import Prompt
from vidworld.world.spec import WorldSpec
from vidworld.world.world import WorldModel

SHOWN = ("ratio_shuffled", "ratio_zero", "ratio_shifted")
PICTURES = 8


class Validation:
    """Mean losses over held-out batches; before the bootstrap, so that they mean the same all run long.

    batches: those of each embodiment by its name.
    """

    def __init__(
        self, batches: Mapping[str, Sequence[Batch]], autocast: Callable[[], torch.autocast]
    ) -> None:
        self.batches, self.autocast = batches, autocast

    @torch.no_grad()
    def __call__(self, step: int, task: Task[Any]) -> Mapping[str, Any]:
        """Values named `val_...`: of several embodiments their mean, beside `val_.../<name>`."""
        found = {name: self._losses(task, batches) for name, batches in self.batches.items()}
        values = {
            f"val_{loss}": sum(losses[loss] for losses in found.values()) / len(found)
            for loss in next(iter(found.values()))
        }
        if len(found) > 1:
            values |= {
                f"val_{loss}/{name}": v for name, losses in found.items() for loss, v in losses.items()
            }
        return values

    def _losses(self, task: Task[Any], batches: Sequence[Batch]) -> dict[str, float]:
        device = next(task.parameters()).device
        sums: dict[str, float] = {}
        clips = sum(len(batch.ids) for batch in batches)
        for number, batch in enumerate(batches):
            with self.autocast():
                losses = task(batch.to(device), noise_generator(0, 0, number, device), Moment())
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(batch.ids) / clips
        return {name: value for name, value in sums.items() if name != "bootstrap"}


class FaithfulnessAlarm:
    """Compares the loss under true and wrong actions, and warns when the model does not seem to listen.

    batches: those of each embodiment by its name; each is judged by itself, warned of once, and again only if
    it has listened in between.
    """

    def __init__(
        self,
        batches: Mapping[str, Sequence[Batch]],
        spec: WorldSpec,
        config: LookConfig,
        progress: Callable[[], float],
        say: Callable[[str], None],
        autocast: Callable[[], torch.autocast],
    ) -> None:
        self.batches, self.spec, self.config = batches, spec, config
        self.progress, self.say, self.autocast = progress, say, autocast
        self._said: set[str] = set()

    @torch.no_grad()
    def __call__(self, step: int, task: WorldTask) -> Mapping[str, Any]:
        """Values named `faithful_...`; ratios of about 1 mean that the actions are ignored.

        Of several embodiments they are named `faithful_.../<name>`.
        """
        values = {}
        for name, batches in self.batches.items():
            # The actions of a clip are swapped with those of another: one alone says nothing.
            several = [batch for batch in batches if len(batch.ids) > 1]
            if not several:
                self._once(f"no other {name}", f"no check of the actions of {name!r}: one clip a batch")
                continue
            ratios = self._ratios(task, several)
            suffix = f"/{name}" if len(self.batches) > 1 else ""
            values |= {f"faithful_{kind}{suffix}": value for kind, value in ratios.items()}
            self._judge(step, name, ratios["ratio_shuffled"])
        return values

    def _judge(self, step: int, name: str, shuffled: float) -> None:
        if shuffled >= self.config.alarm_ratio:
            self._said.discard(name)
        elif self.progress() >= self.config.alarm_after:
            of = f" of {name!r}" if len(self.batches) > 1 else ""
            self._once(
                name,
                f"warning: step {step}: shuffled actions{of} cost only {shuffled:.3f} x the loss of true "
                f"ones (below {self.config.alarm_ratio:g}): the model hardly listens to its actions. Look at "
                "the actions' units and timing with `vidworld inspect`, and at how varied they are",
            )

    def _once(self, key: str, line: str) -> None:
        if key not in self._said:
            self._said.add(key)
            self.say(line)

    def _ratios(self, task: WorldTask, batches: Sequence[Batch]) -> dict[str, float]:
        device = next(task.parameters()).device
        sums: dict[str, float] = {}
        for number, batch in enumerate(batches):
            batch = task.widened(batch.to(device))
            with self.autocast():
                found = action_faithfulness(
                    first_member(task.net),
                    task.normalizer,
                    task.clean(batch),
                    batch.actions_BTA,
                    batch.embodiment_B,
                    seed=number,
                    context_noise=self.spec.sampler.context_noise,
                    finest_steps=self.spec.sampler.finest_steps,
                )
            for name in SHOWN:
                sums[name] = sums.get(name, 0.0) + found[name] / len(batches)
        return sums


class WorldSamples:
    """Imagines held-out episodes from their first frames and writes truth beside model as mp4.

    label: of the dataset in a mixture; names a folder of its own and its value.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        tokenizer: Tokenizer,
        spec: WorldSpec,
        config: LookConfig,
        out: Path,
        label: str = "",
    ) -> None:
        self.dataset, self.tokenizer, self.config = dataset, tokenizer, config
        self.out, self.label = out / label if label else out, label
        self.names = [contract.embodiment for contract in dataset.manifest.contracts]
        self.whole, self.spec = spec, spec.only(self.names) if spec.layouts else spec
        k = spec.frames_per_step
        self.prompt_frames = 1 + (config.prompt_frames - 1) // k * k
        manifest = dataset.manifest
        samples = manifest.samples("val") or manifest.samples("train")
        needed = self.prompt_frames + k
        self.keys = [sample.key for sample in samples if sample.frames >= needed][: config.sample_episodes]

    @torch.no_grad()
    def __call__(self, step: int, task: WorldTask) -> Mapping[str, Any]:
        """Writes `samples/step-<step>-<key>.mp4` and gives "sample_psnr", the mean over imagined frames."""
        # Straight from the trained parts: only the weights differ from look to look.
        spec = replace(self.whole, model=replace(self.whole.model, members=0))
        world = WorldModel(spec, first_member(task.net), task.normalizer, self.tokenizer)
        if self.whole.layouts:
            world = narrow(world, self.names)
        psnrs = []
        for key in self.keys:
            try:
                truth_TVHWC, model_TVHWC = self._imagine(world, key)
            except VidworldError as error:  # a model that is still wild must not stop its training
                warnings.warn(f"no sample of episode {key!r}: {error}", stacklevel=2)
                continue
            start = self.prompt_frames
            psnrs.append(_psnr(truth_TVHWC[start:], model_TVHWC[start:]))
            views = range(truth_TVHWC.shape[1])
            videos = [video[:, view] for view in views for video in (truth_TVHWC, model_TVHWC)]
            labels = [f"{who} {self.spec.views[view]}" for view in views for who in ("truth", "model")]
            media.write_mp4(
                self.out / f"step-{step:08d}-{key}.mp4",
                media.grid(videos, columns=2, labels=labels),
                self.spec.fps,
            )
        name = f"sample_psnr/{self.label}" if self.label else "sample_psnr"
        return {name: float(np.mean(psnrs))} if psnrs else {}

    def _imagine(self, world: WorldModel, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Truth and model [T, V, H, W, 3] uint8, the prompt's frames first in both."""
        k, start = self.spec.frames_per_step, self.prompt_frames
        length = self.dataset.sample(key).frames
        horizon = min(self.config.horizon, length - start) // k * k
        clip = self.dataset.read_clip(key, 0, start + horizon)
        truth_TVHWC = self._truth(world, clip.video, clip.latents)
        prompt = Prompt(
            truth_TVHWC[:start],
            proprio=clip.proprio_TS[:start],
            actions=clip.actions_TA[: start - 1],
            embodiment=self.dataset.sample(key).embodiment,
        )
        state = world.reset(prompt, allow_out_of_range=True)
        actions_TA = clip.actions_TA[start - 1 : start - 1 + horizon]
        rollout = world.rollout(state, actions_TA, allow_out_of_range=True)
        assert rollout.video_BTVHWC is not None
        imagined_TVHWC = rollout.video_BTVHWC[0].cpu().numpy()
        return truth_TVHWC, np.concatenate([truth_TVHWC[:start], imagined_TVHWC])

    def _truth(
        self,
        world: WorldModel,
        video: Mapping[str, np.ndarray] | None,
        latents: Mapping[str, np.ndarray] | None,
    ) -> np.ndarray:
        """The recorded frames, or the tokenizer's view of them where only latents are at hand."""
        if video is not None:
            return np.stack([video[view] for view in self.spec.views], 1)
        assert latents is not None
        stacked_TVChw = np.stack([latents[view] for view in self.spec.views], 1)
        decoded_BTVCHW = world.decode(torch.from_numpy(stacked_TVChw).float().to(world.device)[None])
        return to_pixels(decoded_BTVCHW[0]).movedim(-3, -1).cpu().numpy()


class TokenizerSamples:
    """Writes held-out frames beside their reconstructions as a PNG, one for each embodiment."""

    def __init__(
        self, batches: Mapping[str, Sequence[Batch]], out: Path, autocast: Callable[[], torch.autocast]
    ) -> None:
        self.batches, self.out, self.autocast = batches, out, autocast

    @torch.no_grad()
    def __call__(self, step: int, task: TokenizerTask) -> Mapping[str, Any]:
        """Writes `samples/step-<step>.png`, or `step-<step>-<name>.png`."""
        for name, (batch, *_) in self.batches.items():
            suffix = f"-{name}" if len(self.batches) > 1 else ""
            self._write(task, batch, self.out / f"step-{step:08d}{suffix}.png")
        return {}

    def _write(self, task: TokenizerTask, batch: Batch, path: Path) -> None:
        shown_NTCHW = pictures(batch, task.layouts)[0]
        video_NTCHW = shown_NTCHW[:PICTURES, :1].to(next(task.parameters()).device)
        with self.autocast():
            decoded_NTCHW = task.net.decode_raw(task.net.encode_raw(video_NTCHW))
        rows = {
            name: to_pixels(tensor_NTCHW[:, 0].float()).movedim(1, -1).cpu().numpy()
            for name, tensor_NTCHW in (("frames", video_NTCHW), ("tokenizer", decoded_NTCHW))
        }
        count = len(rows["frames"])
        image = media.strip(rows, range(count))
        media.write_png(path, image)


def _psnr(truth: np.ndarray, model: np.ndarray) -> float:
    """PSNR in dB of uint8 videos, mean over frames."""
    squared = (truth.astype(np.float64) - model) ** 2
    per_frame = squared.reshape(len(squared), -1).mean(1)
    return float(np.mean(10 * np.log10(255**2 / np.maximum(per_frame, 1e-3))))
