from dataclasses import dataclass, replace

import pytest
import torch

from vidworld.errors import ConfigError
from vidworld.model.cache import KeyValue, KVCache
from vidworld.model.inputs import Streams
from vidworld.model.two_stream import cached_predictor, ingest, target_predictor

EXACT = 1e-11


def commit(model, clip, cache=None):
    return ingest(model, clip.frames, clip.level, clip.conditioning, cache)


def predict_next(model, clip, cache):
    """Denoise the last frame of `clip` against the cache."""
    last = clip.time(slice(-1, None))
    return cached_predictor(model, last.conditioning, cache)(last.frames, last.level, last.step_BT)


def marked(num_frames, batch=2):
    """A cache whose every entry says which row and frame it came from."""
    entry = torch.arange(batch)[:, None] * 100 + torch.arange(num_frames)
    tensor = entry[:, None, None, :, None].expand(batch, 3, 2, num_frames, 4).double()
    return KVCache((KeyValue(tensor, -tensor),) * 2)


def entries(cache):
    """Row and frame marks of every layer, checked to agree."""
    found = {str(layer.key[:, 0, 0, :, 0].tolist()) for layer in cache.layers}
    found |= {str((-layer.value)[:, -1, -1, :, -1].tolist()) for layer in cache.layers}
    assert len(found) == 1
    return cache.layers[0].key[:, 0, 0, :, 0].long().tolist()


def test_append_fork_roll_truncate_by_hand():
    cache = marked(5)
    assert entries(cache.append(marked(2).layers)) == [
        [0, 1, 2, 3, 4, 0, 1],
        [100, 101, 102, 103, 104, 100, 101],
    ]
    assert entries(cache.fork(torch.tensor([1, 1, 0])))[0] == [100, 101, 102, 103, 104]
    assert entries(cache.roll(3))[0] == [2, 3, 4]
    assert entries(cache.roll(3, sink=1))[0] == [0, 3, 4]
    assert entries(cache.roll(4, sink=2))[1] == [100, 101, 103, 104]
    assert cache.roll(5, sink=1) is cache
    assert entries(cache) == entries(marked(5)), "the old cache stays as it was"
    assert (cache.num_frames, cache.batch_size) == (5, 2)


def test_the_sink_stays_pinned_over_many_rolls():
    cache = marked(2)
    for frame in range(2, 30):
        newest = marked(frame + 1).layers
        cache = cache.append([KeyValue(k[:, :, :, -1:], v[:, :, :, -1:]) for k, v in newest]).roll(6, sink=2)
        assert entries(cache)[0] == (
            [*range(frame + 1)] if frame < 6 else [0, 1, *range(frame - 3, frame + 1)]
        )


@pytest.mark.parametrize(("window", "sink"), [(3, 3), (0, 0), (3, -1)])
def test_roll_refuses(window, sink):
    with pytest.raises(ConfigError, match="sink"):
        marked(5).roll(window, sink)


@pytest.mark.parametrize("chunks", [[1] * 6, [4, 1, 1], [2, 3, 1], [6]])
def test_cached_equals_uncached(make_model, make_clip, difference, chunks):
    """However the frames are cut into passes, each sees what one causal pass over all would show it."""
    model, clip = make_model(), make_clip(time=6)
    expected, whole = model(*clip.parts(), streams=Streams(6), commit=True)
    cache, start = None, 0
    for length in chunks:
        part = clip.time(slice(start, start + length))
        got, cache = model(*part.parts(), streams=Streams(length), cache=cache, commit=True)
        assert difference(got, expected[:, start : start + length]) < EXACT
        start += length
    assert cache is not None
    for layer, expected_layer in zip(cache.layers, whole.layers, strict=True):
        torch.testing.assert_close(layer, expected_layer, atol=EXACT, rtol=0)


def test_forked_rows_go_on_as_their_originals(make_model, make_clip, difference):
    model, clip = make_model(), make_clip(time=5)
    index = torch.tensor([2, 0, 0, 1])
    _, cache = model(*clip.time(slice(0, 3)).parts(), streams=Streams(3), commit=True)
    forked = cache.fork(index)
    got, _ = model(*clip.time(slice(3, 5))[index].parts(), streams=Streams(2), cache=forked)
    expected, _ = model(*clip.parts(), streams=Streams(5))
    assert difference(got, expected[index][:, 3:]) < EXACT


def test_a_pass_without_commit_leaves_the_cache(make_model, make_clip):
    model, clip = make_model(), make_clip(time=5)
    cache = commit(model, clip.time(slice(0, 4)))
    copies = [layer.key.clone() for layer in cache.layers]
    assert model(*clip.time(slice(4, 5)).parts(), streams=Streams(1), cache=cache)[1] is None
    assert all(torch.equal(layer.key, copy) for layer, copy in zip(cache.layers, copies, strict=True))


def test_a_commit_can_be_merged_into_the_next_pass(make_model, make_clip, difference):
    """Committing frame 3 and denoising frame 4 in one pass is exact."""
    model, clip = make_model(), make_clip(time=5)
    cache = commit(model, clip.time(slice(0, 3)))
    pair = clip.time(slice(3, 5))
    got, longer = model(*pair.parts(), streams=Streams(2), cache=cache, commit=True)
    _, committed = model(*pair.time(slice(0, 1)).parts(), streams=Streams(1), cache=cache, commit=True)
    expected, _ = model(*pair.time(slice(1, 2)).parts(), streams=Streams(1), cache=committed)
    assert difference(got[:, 1:], expected) < EXACT
    for layer, expected_layer in zip(longer.layers, committed.layers, strict=True):
        undecided = KeyValue(layer.key[:, :, :, :4], layer.value[:, :, :, :4])
        torch.testing.assert_close(undecided, expected_layer, atol=EXACT, rtol=0)


@dataclass(frozen=True)
class SlidingStreams(Streams):
    """Two streams whose frames see at most `window` earlier frames."""

    window: int = 3

    def visible(self, query, key):
        age = query % self.context - key % self.context
        return super().visible(query, key) & (age <= self.window)


def test_rolled_cache_equals_a_sliding_window_over_all_frames(make_model, make_clip, difference, monkeypatch):
    """At any depth and length: slots move down as the cache rolls, and relative time makes that invisible."""
    model, context, targets = make_model(), make_clip(time=9, seed=1), make_clip(time=9, seed=2)
    monkeypatch.setattr("vidworld.model.two_stream.Streams", SlidingStreams)
    predict = target_predictor(model, context.frames, context.level, context.conditioning)
    expected = predict(targets.frames, targets.level, targets.step_BT)
    monkeypatch.undo()

    cache = None
    for frame in range(9):
        now = slice(frame, frame + 1)
        target = targets.time(now)
        predict = cached_predictor(model, context.time(now).conditioning, cache)
        got = predict(target.frames, target.level, target.step_BT)
        assert difference(got, expected[:, now]) < EXACT
        cache = commit(model, context.time(now), cache).roll(3)


@pytest.mark.parametrize("sink", [0, 2])
def test_with_one_time_layer_a_rolled_cache_equals_the_window_recomputed(
    make_model, make_clip, difference, sink
):
    """Then a frame's keys hold nothing of other frames, so the kept ones are all there is to know."""
    model, clip = make_model(time_every=4), make_clip(time=9)
    rolled = commit(model, clip.time(slice(0, 8))).roll(5, sink)
    kept = [*range(sink), *range(8 - (5 - sink), 8)]
    recomputed = commit(model, clip.time(kept))
    assert difference(predict_next(model, clip, rolled), predict_next(model, clip, recomputed)) < EXACT


def test_with_more_time_layers_the_kept_frames_remember_the_dropped(make_model, make_clip, difference):
    """Negative control, and what users should know: recomputing the window is another answer."""
    model, clip = make_model(time_every=2), make_clip(time=9)
    rolled = commit(model, clip.time(slice(0, 8))).roll(5)
    recomputed = commit(model, clip.time(slice(3, 8)))
    assert difference(predict_next(model, clip, rolled), predict_next(model, clip, recomputed)) > 1e-3


def test_a_cache_keeps_its_newest_frame_through_all_that_is_done_to_it(make_model, make_clip):
    """For models that are given the frame before: as it was committed, of each row, whatever was dropped."""
    model, clip = make_model(previous_frame=True), make_clip(time=6)
    index = torch.tensor([2, 0])
    cache = commit(model, clip.time(slice(4, 6)), commit(model, clip.time(slice(0, 4))).roll(2)).fork(index)
    newest = clip.frames[index, 5:6]
    assert torch.equal(cache.newest.latents_BTVChw, newest.latents_BTVChw)
    assert torch.equal(cache.map(lambda x: -x).newest.proprio_BTS, -newest.proprio_BTS)
    assert commit(make_model(), clip).newest is None, "of a model that does not read it"
    with pytest.raises(AssertionError, match="without the newest one"):
        predict_next(model, clip[index], replace(cache, newest=None))


def test_the_pinned_sink_is_seen(make_model, make_clip, difference):
    model, clip = make_model(), make_clip(time=9)
    cache = commit(model, clip.time(slice(0, 8)))
    with_sink, without = (predict_next(model, clip, cache.roll(5, sink)) for sink in (1, 0))
    assert difference(with_sink, without) > 1e-3


def test_order_of_cached_frames_matters(make_model, make_clip, difference):
    """Negative control of the slots: keys are rotated by where they stand."""
    model, clip = make_model(), make_clip(time=4)
    cache = commit(model, clip.time(slice(0, 3)))
    flipped = KVCache(tuple(KeyValue(k.flip(3), v.flip(3)) for k, v in cache.layers))
    assert difference(predict_next(model, clip, cache), predict_next(model, clip, flipped)) > 1e-3


def test_gradients_flow_through_the_cache(make_model, make_clip):
    model, clip = make_model(), make_clip(time=4)
    clip.conditioning.actions_BTkA.requires_grad_()
    clip.conditioning.keep_BT.fill_(True)
    cache = commit(model, clip.time(slice(0, 3))).roll(2).fork(torch.tensor([0, 1, 2, 0]))
    predict_next(model, clip[torch.tensor([0, 1, 2, 0])], cache).latents_BTVChw.square().sum().backward()
    assert (clip.conditioning.actions_BTkA.grad.abs().amax((-1, -2)) > 0).all()
