"""Policies inside a rollout: as a function and behind a websocket, same numbers and clear refusals."""

import json
import sys
import threading
import types

import numpy as np
import pytest
from websockets.sync.server import serve

from vidworld import cli
from vidworld.contract import ActionContract, Dimension, Statistics
from vidworld.data.shards import ShardDataset
from vidworld.errors import ConfigError, ContractError
from vidworld.evaluation.openpi import OpenpiClient, PolicyError, pack, unpack
from vidworld.evaluation.policy import Actor, open_policy, parse_keys


def steer(observation):
    """Two actions that depend on all that is seen."""
    brightness = observation["observation/top"].mean() / 255
    state = observation["observation/state"]
    first = [0.2 * np.tanh(state[0]), brightness - 0.5, 0.0]
    return {"actions": np.array([first, [0.1, 0.0, 1.0]], np.float32)}


@pytest.fixture
def server():
    """Serve a function by openpi's protocol; returns its URL and what it was sent."""
    stopped = []

    def start(function, metadata=None):
        received = []

        def handle(socket):
            socket.send(pack(metadata or {"name": "test"}))
            for message in socket:
                received.append(unpack(message))
                answer = function(received[-1])
                socket.send(answer if isinstance(answer, str | bytes) else pack(answer))

        running = serve(handle, "127.0.0.1", 0, compression=None, max_size=None)
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        stopped.append((running, thread))
        return f"ws://127.0.0.1:{running.socket.getsockname()[1]}", received

    yield start
    for running, thread in stopped:
        running.shutdown()
        thread.join(10)


@pytest.fixture
def module(monkeypatch):
    found = types.ModuleType("policies_of_test")
    found.steer, found.number = steer, 3
    monkeypatch.setitem(sys.modules, "policies_of_test", found)
    return found


@pytest.fixture
def rollout(untrained_run, planar_data, tmp_path):
    episode = ShardDataset.open(planar_data).manifest.samples("val")[0].key

    def run(name, *arguments):
        out = tmp_path / name
        given = ["--prompt", episode, "--data", planar_data, "--frames", 5, "--samples", 2]
        code = cli.run(["rollout", *map(str, [untrained_run, "--out", out, *given, *arguments])])
        assert (code == 0) == out.exists()
        return code or out

    return run


def actor(policy, **options):
    values = np.random.default_rng(0).uniform(-1, 1, (50, 2))
    dims = tuple(Dimension(f"d{index}", "rad", "velocity") for index in range(2))
    contract = ActionContract("arm", 10.0, dims, dims, Statistics.of(values), Statistics.of(values))
    return Actor(policy, contract, ("top", "wrist"), **options)


def test_the_wire_format_is_openpis():
    """Byte for byte what openpi's msgpack_numpy packs (an array and a scalar), and back."""
    import msgpack

    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    expected = {
        "a": {b"__ndarray__": True, b"data": array.tobytes(), b"dtype": "<f4", b"shape": (2, 3)},
        "b": {b"__npgeneric__": True, b"data": 2.5, b"dtype": "<f4"},
        "prompt": "fold it",
    }
    packed = pack({"a": array, "b": np.float32(2.5), "prompt": "fold it"})
    assert packed == msgpack.packb(expected)
    again = unpack(packed)
    assert np.array_equal(again["a"], array)
    assert again["a"].dtype == np.float32
    assert (again["b"], again["prompt"]) == (2.5, "fold it")
    with pytest.raises(ValueError, match="objects"):
        unpack(msgpack.packb({b"__ndarray__": True, b"data": b"", b"dtype": "|O", b"shape": (0,)}))


def test_a_function_and_its_server_give_the_same_rollout(rollout, server, module):
    local = rollout("local", "--policy", "policies_of_test:steer")
    url, received = server(steer)
    remote = rollout("remote", "--policy", url)
    for sample in range(2):
        given = [np.load(out / f"actions-00{sample}.npy") for out in (local, remote)]
        assert given[0].shape == (5, 3)
        assert np.array_equal(given[0], given[1])
        # The second action of each chunk is played before the policy is asked again.
        assert np.allclose(given[0][1::2], [0.1, 0.0, 1.0])
    arrays = [np.load(out / "proprio.npz")["predicted_NTS"] for out in (local, remote)]
    assert np.array_equal(arrays[0], arrays[1])
    assert len(received) == 2 * 3
    assert set(received[0]) == {"observation/top", "observation/state", "prompt"}
    assert received[0]["observation/top"].dtype == np.uint8
    assert received[0]["observation/top"].shape == (32, 32, 3)
    record = json.loads((remote / "rollout.json").read_text())
    assert record["actions"]["source"] == url
    # The loop is closed: what the world answered is what the policy saw next.
    assert np.allclose(received[2]["observation/state"], arrays[1][0, 1], atol=1e-6)
    again = rollout("again", "--actions", remote / "actions-000.npy")
    assert np.abs(np.load(again / "proprio.npz")["predicted_NTS"][0] - arrays[1][0]).max() < 1e-4


def test_it_is_asked_again_and_names_are_the_policys(rollout, server):
    url, received = server(lambda seen: {"actions": np.zeros((9, 3), np.float32)})
    rollout("r", "--policy", url, "--replan", 2, "--policy-keys", "top=image", "state=joints")
    assert len(received) == 2 * 3
    assert set(received[0]) == {"image", "joints", "prompt"}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("Traceback\nKeyError: 'image'", "the policy failed in ws://"),
        ({"action": [0]}, "got a dict of action, expected `actions` in it"),
        ({"actions": np.zeros((4, 2), np.float32)}, "shape (4, 2)"),
        ({"actions": np.full((4, 3), np.nan, np.float32)}, "not finite"),
        (b"\xc1", "expected msgpack"),
    ],
)
def test_bad_answers_end_in_one_line(rollout, server, capsys, answer, message):
    url, _ = server(lambda seen: answer)
    assert rollout("r", "--policy", url) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "KeyError: 'image'" in error or not isinstance(answer, str)


def test_policies_that_are_not_there(rollout, module, capsys):
    for name, message in (
        ("nowhere_to_be_found:f", "No module named"),
        ("policies_of_test:gone", "no attribute 'gone'"),
        ("policies_of_test:number", "a int, expected a callable"),
        ("policies_of_test", "expected module:callable"),
        ("ws://127.0.0.1:9", "cannot reach the policy in ws://127.0.0.1:9"),
    ):
        assert rollout("r", "--policy", name) == 2
        assert message in capsys.readouterr().err


def test_a_class_is_made_once(module):
    class Counting:
        made = 0

        def __init__(self):
            Counting.made += 1

        def __call__(self, observation):
            return np.zeros(3)

    module.Counting = Counting
    with open_policy("policies_of_test:Counting") as policy:
        policy({})
        policy({})
    assert Counting.made == 1


def test_the_key_is_sent(server, monkeypatch):
    url, _ = server(lambda seen: {"actions": [[0.0]]}, {"needs": "nothing"})
    with OpenpiClient(url, api_key="secret") as client:
        assert client.metadata == {"needs": "nothing"}
        headers = client._socket.request.headers
        assert headers["Authorization"] == "Api-Key secret"


def test_rows_have_chunks_of_their_own():
    counts = []

    def policy(seen):
        counts.append(seen["observation/state"][0])
        return np.full((3, 2), seen["observation/state"][0])

    player = actor(policy)
    pictures, states = np.zeros((2, 2, 4, 4, 3), np.uint8), np.array([[1.0, 0.0, 9.0], [2.0, 0.0, 9.0]])
    for _ in range(3):
        assert player.act(pictures, states, ["", ""])[:, 0, 0].tolist() == [1, 2]
    assert counts == [1, 2]
    player.act(pictures, states, ["", ""])
    assert counts == [1, 2, 1, 2]


def test_steps_of_several_actions_and_bad_chunks():
    player = actor(lambda seen: np.arange(8.0).reshape(4, 2), actions_per_step=2)
    pictures, states = np.zeros((1, 2, 4, 4, 3), np.uint8), np.zeros((1, 2))
    assert player.act(pictures, states, [""]).tolist() == [[[0, 1], [2, 3]]]
    assert player.act(pictures, states, [""]).tolist() == [[[4, 5], [6, 7]]]
    with pytest.raises(ContractError, match="H >= 2"):
        actor(lambda seen: np.zeros(2), actions_per_step=2).act(pictures, states, [""])
    with pytest.raises(PolicyError, match="got a dict of nothing"):
        actor(lambda seen: {}).act(pictures, states, [""])


def test_keys_are_parsed_and_checked():
    assert parse_keys(["top=a/b", "state=s=t"]) == {"top": "a/b", "state": "s=t"}
    with pytest.raises(ConfigError, match="OURS=THEIRS"):
        parse_keys(["top"])
    with pytest.raises(ConfigError, match="got side, expected some of top, wrist, state, prompt"):
        actor(steer, keys={"side": "x"})
