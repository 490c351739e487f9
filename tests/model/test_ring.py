"""The ring holds what the rolled cache holds, bit for bit, and a pass against it gives the same frames."""

import pytest
import torch

from vidworld.errors import ConfigError
from vidworld.model.cache import KeyValue, KVCache
from vidworld.model.inputs import Streams
from vidworld.model.ring import Clock, RingCache


def random_frame(generator, batch=2):
    layers = (torch.randn(2, batch, 3, 2, 1, 4, generator=generator) for _ in range(2))
    return tuple(KeyValue(*layer) for layer in layers)


def equal(left: KVCache, right: KVCache) -> bool:
    pairs = zip(left.layers, right.layers, strict=True)
    return all(torch.equal(a.key, b.key) and torch.equal(a.value, b.value) for a, b in pairs)


@pytest.mark.parametrize(("window", "sink"), [(2, 0), (4, 0), (5, 1), (6, 3), (3, 1)])
def test_it_holds_what_the_rolled_cache_holds(window, sink):
    generator = torch.Generator().manual_seed(0)
    clock = Clock(window, sink)
    cache = KVCache(random_frame(generator))
    ring = RingCache.from_cache(cache, clock)
    for _ in range(4 * window):
        new = random_frame(generator)
        cache = cache.roll(window - 1, sink).append(new)
        before, old = ring.to_cache(), ring
        ring = ring.append(new)
        assert equal(ring.to_cache(), cache)
        assert equal(old.to_cache(), before), "the old ring stays as it was"
        assert all(layer.key.shape[3] == window for layer in ring.layers)
        again = RingCache.from_cache(cache, clock).append(new)
        assert equal(again.to_cache(), cache.roll(window - 1, sink).append(new)), "from any frame on"


def test_forks_are_copies():
    generator = torch.Generator().manual_seed(1)
    ring = RingCache.from_cache(KVCache(random_frame(generator)), Clock(4))
    forked = ring.fork(torch.tensor([1, 1, 0]))
    assert equal(forked.to_cache(), ring.to_cache().fork(torch.tensor([1, 1, 0])))
    forked.layers[0].key.zero_()
    assert ring.layers[0].key.abs().max() > 0


@pytest.mark.parametrize(("window", "sink"), [(5, 0), (6, 2)])
def test_positions_are_those_of_the_rolled_cache(window, sink):
    """Roll a list of frame numbers beside the clock and compare where each frame stands."""
    clock, cached = Clock(window, sink), []
    for frame in range(5 * window):
        moment = clock.at(frame)
        if len(cached) > window - 1:
            cached = cached[:sink] + cached[len(cached) - (window - 1 - sink) :]
        expected = {one: place for place, one in enumerate([*cached, frame])}
        slots = {clock.slot(one): place for one, place in expected.items()}
        assert moment.position == expected[frame] == len(cached)
        assert {s: p for s, p in enumerate(moment.positions_W) if moment.seen_W[s]} == slots
        assert clock.is_full(frame) == all(moment.seen_W)
        same = clock.moments[clock.row(frame)]
        assert (same.slot, same.positions_W, same.seen_W) == (moment.slot, moment.positions_W, moment.seen_W)
        cached.append(frame)


@pytest.mark.parametrize(("window", "sink"), [(3, 2), (1, 0), (4, -1)])
def test_a_sink_that_leaves_no_room_is_refused(window, sink):
    with pytest.raises(ConfigError, match="sink of the KV ring"):
        Clock(window, sink)


def test_an_empty_ring_has_no_cache(make_model, make_clip):
    model, clip = make_model(), make_clip(time=1)
    _, cache = model(*clip.parts(), streams=Streams(1), commit=True)
    empty = RingCache(Clock(4), RingCache.from_cache(cache, Clock(4)).layers, 0)
    with pytest.raises(ValueError, match="empty"):
        empty.to_cache()
