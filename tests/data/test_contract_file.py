import pytest

from vidworld.contract import Dimension
from vidworld.data.contract_file import Described, read_contracts
from vidworld.errors import ConfigError
from vidworld.types import EmbodimentSpec

ARM = EmbodimentSpec(
    "arm",
    10,
    action=(Dimension("joint_0_vel", kind="velocity"), Dimension("joint_1_vel"), Dimension("gripper")),
    proprio=(Dimension("joint_0"), Dimension("joint_1")),
)


@pytest.fixture
def file(tmp_path):
    def write(text, name="contract.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_says_what_the_logs_do_not(file):
    path = file(
        """
        embodiment: cr5
        control_frame: joint
        note: measured
        action:
          joint_*_vel: {unit: rad/s}
          gripper: {name: grip, unit: "1", kind: binary}
        """
    )
    described = read_contracts([path], [ARM])["arm"]
    spec = described.spec
    assert described.mapping is None, "no number changes"
    assert (spec.embodiment, spec.control_frame, spec.note) == ("cr5", "joint", "measured")
    assert spec.action == (
        Dimension("joint_0_vel", "rad/s", "velocity"),
        Dimension("joint_1_vel", "rad/s", "unknown"),
        Dimension("grip", "1", "binary"),
    )
    assert spec.proprio == ARM.proprio


def test_nothing_said_nothing_changed(file):
    assert read_contracts([], [ARM]) == {"arm": Described(ARM)}
    assert read_contracts([file("")], [ARM]) == {"arm": Described(ARM)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("action: {griper: {kind: binary}}", r"no dimension is called 'griper'.*did you mean 'gripper'"),
        ("action: {'joint_*': {name: j}}", "gives 2 dimensions one name"),
        ("action: {gripper: {kind: clamp}}", "clamp"),
        ("action: {gripper: {knd: binary}}", r"unknown setting 'knd' in 'gripper' of .*did you mean 'kind'"),
        ("contrl_frame: joint", "did you mean 'control_frame'"),
        ("applies_to: leg", r"applies_to .*got leg, expected arm"),
    ],
)
def test_mistakes_are_named(file, text, message):
    with pytest.raises(ConfigError, match=message):
        read_contracts([file(text)], [ARM])


def test_several_robots_need_a_file_each(file):
    leg = EmbodimentSpec("leg", 10, action=(), proprio=())
    with pytest.raises(ConfigError, match="expected arm or leg"):
        read_contracts([file("note: x")], [ARM, leg])
    one, two = file("applies_to: leg\nnote: x", "1.yaml"), file("applies_to: leg\nnote: y", "2.yaml")
    described = read_contracts([one], [ARM, leg])
    assert (described["arm"].spec, described["leg"].spec.note) == (ARM, "x")
    with pytest.raises(ConfigError, match="second contract file"):
        read_contracts([one, two], [ARM, leg])
    with pytest.raises(ConfigError, match="one name"):
        read_contracts([file("applies_to: leg\nembodiment: arm", "3.yaml")], [ARM, leg])
