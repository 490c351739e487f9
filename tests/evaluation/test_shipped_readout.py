"""The readout that comes with the package."""

import numpy as np

from vidworld.data.shards import ShardDataset
from vidworld.evaluation.fidelity import iou
from vidworld.evaluation.lab_frames import scene
from vidworld.evaluation.lab_truth import kind_of, read_truth
from vidworld.evaluation.quantities import SUBJECTS
from vidworld.evaluation.readout import load_readout
from vidworld.world.shipped import FOLDER


def test_the_readout_that_comes_along_reads_unseen_episodes():
    """Its masks cover the true ones, and not those of the frames half an episode away."""
    readout = load_readout("lab")
    assert set(readout.kinds) == set(SUBJECTS)
    dataset = ShardDataset.open(FOLDER / "lab" / "prompts")
    for sample in dataset.manifest.samples():
        episode = dataset.read(sample.key)
        kind = kind_of(episode.meta, where=sample.key)
        if kind == "paint":
            continue  # nothing is painted yet in the short prompt
        frames_THWC = scene(episode)
        truth = read_truth(episode.meta, frames_THWC, where=sample.key)
        readings = readout(frames_THWC[None], kind)
        (name, *_) = [mask for mask in SUBJECTS[kind].masks if mask in ("smoke", "liquid", "box", "arm")]
        read_THW, true_THW = readings.masks[name][0], truth.masks_THW[name]
        later_THW = np.roll(true_THW, len(true_THW) // 2, axis=0)
        assert np.nanmean(iou(read_THW, true_THW)) > 0.75, kind
        assert np.nanmean(iou(read_THW, later_THW)) < np.nanmean(iou(read_THW, true_THW)) - 0.1, kind
