"""Manifests against the published models of Kubernetes and Kubeflow Trainer; arguments come through."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from vidworld.cli import run as command
from vidworld.errors import ConfigError
from vidworld.trainer.config import read_training
from vidworld.trainer.launch.kubernetes import manifests, object_name, to_text
from vidworld.trainer.launch.settings import KubernetesConfig, LaunchConfig

models = pytest.importorskip("kubeflow_trainer_api.models")

MODELS = {
    "Job": models.IoK8sApiBatchV1Job,
    "Service": models.IoK8sApiCoreV1Service,
    "TrainJob": models.TrainerV1alpha1TrainJob,
}
EXAMPLES = Path(__file__).resolve().parents[3] / "training" / "kubernetes"


def require_valid(manifest: dict[str, Any]) -> None:
    """The model takes it, and drops nothing: an unknown field would be lost on the way."""
    if manifest["kind"] == "ConfigMap":
        assert set(manifest) == {"apiVersion", "kind", "metadata", "data"}
        return
    read = MODELS[manifest["kind"]].from_dict(manifest)
    assert read is not None
    assert read.to_dict() == manifest


def expand(argument: str, variables: dict[str, str]) -> str:
    """What the kubelet makes of an argument: $(NAME) of a known name, and $$ for $."""
    return re.sub(
        r"\$(\$|\(([A-Za-z_]\w*)\))",
        lambda found: "$" if found[1] == "$" else variables.get(found[2], found[0]),
        argument,
    )


def make(tmp_path: Path, toy_config: Path, manifest: str = "job", run: str = "/mnt/runs/x", **more: Any):
    content = yaml.safe_load(toy_config.read_text()) | {"data": "/mnt/data/planar"}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    kubernetes = KubernetesConfig(
        manifest=manifest,  # type: ignore[arg-type]
        image="registry.example/vidworld:0.1",
        volumes=("robot-data:/mnt/data", "runs:/mnt/runs"),
    )
    config = LaunchConfig(launcher="kubernetes", nodes=2, kubernetes=kubernetes, **more)
    return manifests(config, 8, read_training(path), Path(run), ["--max-restarts", "5"])


@pytest.mark.parametrize("manifest", ["job", "trainjob"])
@pytest.mark.parametrize("cpu", [False, True])
def test_manifests_are_valid(tmp_path: Path, toy_config: Path, manifest: str, cpu: bool) -> None:
    objects = make(tmp_path, toy_config, manifest, cpu=cpu, env=("NCCL_DEBUG=INFO",))
    assert [each["kind"] for each in objects][-1] == {"job": "Job", "trainjob": "TrainJob"}[manifest]
    for each in objects:
        require_valid(each)
    assert list(yaml.safe_load_all(to_text(objects))) == objects
    assert ("nvidia.com/gpu" in to_text(objects)) == (not cpu)


def test_the_check_sees_faults(tmp_path: Path, toy_config: Path) -> None:
    """A misspelt field, a wrong type, a missing one."""
    for change in (
        lambda job: job["spec"].update(backofLimit=3),
        lambda job: job["spec"].update(completions="two"),
        lambda job: job["spec"]["template"]["spec"]["containers"][0].pop("name"),
    ):
        job = make(tmp_path, toy_config)[-1]
        change(job)
        with pytest.raises((AssertionError, ValueError)):
            require_valid(job)


@pytest.mark.parametrize("manifest", ["job", "trainjob"])
def test_a_pod_gets_its_arguments_whole(tmp_path: Path, toy_config: Path, manifest: str, odd: str) -> None:
    run = f"/mnt/runs/{odd} $(PET_NODE_RANK)"
    job = make(tmp_path, toy_config, manifest, run)[-1]
    if manifest == "job":
        words = job["spec"]["template"]["spec"]["containers"][0]["command"]
        variables = {"JOB_COMPLETION_INDEX": "1"}
    else:
        words = job["spec"]["trainer"]["command"]
        variables = {"PET_NODE_RANK": "1", "PET_MASTER_ADDR": "x-0", "PET_MASTER_PORT": "29500"}
    seen = [expand(word, variables) for word in words]
    assert seen[:5] == ["python", "-m", "vidworld", "launch", "/etc/vidworld/config.yaml"]
    flags = dict(itertools.pairwise(seen))
    assert flags["--out"] == run
    assert flags["--node-rank"] == "1"
    assert flags["--nodes"] == "2"
    assert flags["--max-restarts"] == "5"
    assert not any("$(" in flags[name] for name in ("--master-addr", "--master-port"))


def test_the_config_travels_with_the_job(tmp_path: Path, toy_config: Path) -> None:
    configmap = make(tmp_path, toy_config)[0]
    path = tmp_path / "in-the-pod.yaml"
    path.write_text(configmap["data"]["config.yaml"])
    assert read_training(path).datasets == (Path("/mnt/data/planar"),)
    assert read_training(path).loop.steps == 8


def test_pods_find_the_first_one_by_name(tmp_path: Path, toy_config: Path) -> None:
    _, service, job = make(tmp_path, toy_config)
    spec = job["spec"]["template"]["spec"]
    words = spec["containers"][0]["command"]
    assert words[words.index("--master-addr") + 1] == "x-0.x.default"
    assert spec["subdomain"] == service["metadata"]["name"] == job["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    rules = job["spec"]["podFailurePolicy"]["rules"]
    assert [rule["onExitCodes"]["values"] for rule in rules if "onExitCodes" in rule] == [[2, 4]]


def test_what_no_volume_holds_is_refused(tmp_path: Path, toy_config: Path) -> None:
    with pytest.raises(ConfigError, match="path that no volume holds: got /home/me/x"):
        make(tmp_path, toy_config, run="/home/me/x")
    path = str(toy_config)
    base = [path, "--launcher", "kubernetes", "--dry-run", "--out", "/mnt/runs/x", "--cpu"]
    assert command(["launch", *base]) == 2
    image = ["--kubernetes.image", "i", "--kubernetes.volumes"]
    assert command(["launch", *base, *image, "runs:/mnt/runs"]) == 2, "the data"
    assert command(["launch", *base, *image, "Bad_Name:/mnt/runs"]) == 2
    assert command(["launch", *base, *image, "runs"]) == 2


def test_names() -> None:
    assert [object_name(name) for name in ("CR5 run_2", "5th", "---", "ü" * 3, "a" * 80)] == [
        "cr5-run-2",
        "run-5th",
        "run",
        "run",
        "a" * 50,
    ]


@pytest.mark.parametrize("name", ["job", "trainjob"])
def test_examples_are_what_the_command_prints(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = EXAMPLES / f"{name}.yaml"
    text = path.read_text()
    header = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("#")]
    words = " ".join(header).replace("\\", "").removeprefix("vidworld ").split()
    words[1] = str(path.parents[2] / words[1])
    assert command(words) == 0
    printed = list(yaml.safe_load_all(capsys.readouterr().out))
    stored = list(yaml.safe_load_all(text))
    for manifest in stored:
        require_valid(manifest)
    for configmap in (printed[0], stored[0]):  # settings that are new in the code need not be in the example
        assert "kind: world" in configmap.pop("data")["config.yaml"]
    assert printed == stored
