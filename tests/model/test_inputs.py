import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vidworld.contract import ActionContract, Dimension, Statistics
from vidworld.errors import ConfigError
from vidworld.model.attention import dense_mask
from vidworld.model.flops import visible_pairs
from vidworld.model.inputs import FrameShape, Streams

CPU = torch.device("cpu")
shapes = st.builds(Streams, context=st.integers(1, 6), targets=st.integers(0, 3), past=st.integers(0, 5))


def expected_visible(streams, query, key):
    """The rule in words, frame by frame."""
    if key < streams.past:
        return True
    query_stream, query_frame = divmod(query, streams.context)
    key_stream, key_frame = divmod(key - streams.past, streams.context)
    if query_stream == 0:
        return key_stream == 0 and key_frame <= query_frame
    return (key_stream == 0 and key_frame < query_frame) or (key_stream, key_frame) == (
        query_stream,
        query_frame,
    )


@given(shapes)
def test_visibility_is_the_rule(streams):
    mask = dense_mask(streams, CPU)
    assert mask.shape == (streams.num_queries, streams.num_keys)
    expected = [
        [expected_visible(streams, q, k) for k in range(streams.num_keys)] for q in range(streams.num_queries)
    ]
    assert mask.tolist() == expected
    assert mask.any(-1).all()
    assert not streams.all_visible or mask.all()
    assert visible_pairs(streams) == mask.sum()


@given(shapes)
def test_nobody_sees_the_future_and_frames_share_positions_over_streams(streams):
    queries, keys = streams.query_positions(CPU), streams.key_positions(CPU)
    seen = dense_mask(streams, CPU)
    assert (keys <= queries[:, None])[seen].all()
    assert torch.equal(
        queries.view(-1, streams.context), queries[: streams.context].expand(1 + streams.targets, -1)
    )
    assert torch.equal(keys[: streams.past + streams.context], torch.arange(streams.past + streams.context))


def contract(name, action_dims, proprio_dims):
    def dimensions(count):
        return tuple(Dimension(f"d{i}") for i in range(count))

    def statistics(count):
        return Statistics(*((float(v),) * count for v in (-1, 1, 0, 1, -1, 1)), count=9)

    return ActionContract(
        name,
        10.0,
        dimensions(action_dims),
        dimensions(proprio_dims),
        statistics(action_dims),
        statistics(proprio_dims),
    )


def test_frame_shape_from_contracts_holds_the_widest():
    contracts = (contract("a", 3, 7), contract("b", 6, 2))
    shape = FrameShape.from_contracts(contracts, views=1, channels=4, height=8, width=8)
    assert (shape.action_dims, shape.proprio_dims, shape.num_embodiments) == (6, 7, 2)
    assert (shape.embodiment_action_dims, shape.embodiment_proprio_dims) == ((3, 6), (7, 2))


@pytest.mark.parametrize(
    "changes", [{"views": 0}, {"embodiment_action_dims": (2,)}, {"embodiment_proprio_dims": (9, 1)}]
)
def test_frame_shape_refuses(changes):
    shape = FrameShape(1, 4, 8, 8, 3, 2, num_embodiments=2)
    with pytest.raises(ConfigError):
        dataclasses.replace(shape, **changes)
