"""What RLDS files of known datasets do not say: their rate, and for some what each number means.

Rates are the control frequencies in the overview table of Open X-Embodiment, as converters of it repeat them
(https://robotics-transformer-x.github.io); a step was recorded once a control step.
"""

from dataclasses import dataclass, field

from vidworld.contract import Dimension


@dataclass(frozen=True)
class RldsCard:
    """One known dataset: which fields are action and state, and the dimensions of each field."""

    embodiment: str
    action: tuple[str, ...]
    state: tuple[str, ...]
    dimensions: dict[str, tuple[Dimension, ...]] = field(default_factory=dict)
    control_frame: str = "unknown"
    note: str = ""


_POSE = (
    *(Dimension(f"ee_{axis}", "m", "position") for axis in "xyz"),
    *(Dimension(f"ee_{angle}", "rad", "position") for angle in ("roll", "pitch", "yaw")),
)
_GRIPPER = Dimension("gripper", "1", "position")
_JOINTS = tuple(Dimension(f"joint_{index}", "rad", "position") for index in range(7))
_STEP = (
    *(Dimension(f"ee_{axis}_delta", "m", "delta") for axis in "xyz"),
    *(Dimension(f"ee_{angle}_delta", "rad", "delta") for angle in ("roll", "pitch", "yaw")),
)
_EULER = "angles are Euler angles as recorded, which jump at +-pi"

_BRIDGE = RldsCard(
    embodiment="widowx",
    action=("action",),
    state=("observation/state",),
    dimensions={"action": (*_STEP, _GRIPPER), "observation/state": (*_POSE, _GRIPPER)},
    control_frame="base",
    note=f"gripper 0 closed to 1 open, absolute; {_EULER}",
)
_DROID = RldsCard(
    embodiment="droid_franka",
    action=("action_dict/cartesian_position", "action_dict/gripper_position"),
    state=(
        "observation/cartesian_position",
        "observation/joint_position",
        "observation/gripper_position",
    ),
    dimensions={
        "action_dict/cartesian_position": _POSE,
        "action_dict/gripper_position": (_GRIPPER,),
        "observation/cartesian_position": _POSE,
        "observation/joint_position": _JOINTS,
        "observation/gripper_position": (_GRIPPER,),
    },
    control_frame="base",
    note=f"commanded pose; gripper 0 open to 1 closed; {_EULER}",
)


def card_of(name: str) -> RldsCard | None:
    """The card of a dataset by its name in dataset_info.json, where there is one."""
    return {
        "bridge_dataset": _BRIDGE,
        "bridge_orig": _BRIDGE,
        "droid": _DROID,
        "droid_100": _DROID,
        "droid_101": _DROID,
        "r2_d2": _DROID,
    }.get(name)


def rate_of(name: str) -> float | None:
    """Steps a second of a dataset by its name, where it is documented."""
    rates = {
        2: "ucsd_kitchen_dataset",
        3: "fractal20220817_data nyu_door_opening_surprising_effectiveness nyu_franka_play_dataset "
        "nyu_rot_dataset ucsd_pick_and_place_dataset berkeley_gnm_recon",
        3.75: "dobbe",
        5: "bridge bridge_dataset bridge_orig berkeley_autolab_ur5 berkeley_mvp berkeley_gnm_cory_hall "
        "cmu_play_fusion dlr_edan_shared_control stanford_robocook",
        10: "kuka bc_z jaco_play berkeley_cable_routing roboturk language_table columbia_cairlab_pusht_real "
        "stanford_hydra_dataset furniture_bench_dataset cmu_franka_exploration_dataset cmu_stretch "
        "utokyo_pr2_opening_fridge utokyo_pr2_tabletop_manipulation utokyo_xarm_pick_and_place "
        "utokyo_xarm_bimanual kaist_nonprehensile tokyo_u_lsmo dlr_sara_pour dlr_sara_grid_clamp "
        "imperialcollege_sawyer_wrist_cam berkeley_fanuc_manipulation cmu_playing_with_food "
        "berkeley_gnm_sac_son fmb fmb_dataset",
        12.5: "asu_table_top",
        15: "droid droid_100 droid_101 r2_d2 taco_play",
        20: "viola austin_buds_dataset austin_sailor_dataset austin_sirius_dataset utaustin_mutex "
        "stanford_kuka_multimodal_dataset maniskill_dataset iamlab_cmu_pickup_insert",
        30: "toto berkeley_rpt",
    }
    short = name.removesuffix("_converted_externally_to_rlds")
    return next((float(rate) for rate, names in rates.items() if short in names.split()), None)
