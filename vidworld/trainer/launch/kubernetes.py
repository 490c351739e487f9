"""Kubernetes: the objects of a run, as a Kubeflow TrainJob or as a plain indexed Job."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from vidworld.config import to_yaml
from vidworld.errors import ConfigError
from vidworld.files import url_of
from vidworld.trainer.config import Training
from vidworld.trainer.launch.settings import LaunchConfig

CONFIG_FOLDER = "/etc/vidworld"
PORT = 29500
GRACE_S = 300
"""Between SIGTERM and SIGKILL: time to save."""

Manifest = dict[str, Any]


def manifests(
    config: LaunchConfig, processes: int, training: Training, run: Path, flags: Sequence[str]
) -> list[Manifest]:
    """The objects to apply.

    flags: what the launcher in each pod is told besides where it is.
    Raises ConfigError when the run or the data lie in no volume.
    """
    settings = config.kubernetes
    if settings.image is None:
        raise ConfigError("--kubernetes.image", fix="name a container image in which vidworld is installed")
    name = object_name(settings.name or run.name)
    claims = dict(_claim(volume) for volume in settings.volumes)
    local = [path for path in training.datasets if url_of(path) is None]
    if (tokenizer := getattr(training, "tokenizer", None)) is not None and isinstance(tokenizer, Path):
        local.append(tokenizer)
    for path in [run, *local]:
        if not any(PurePosixPath(path).is_relative_to(mount) for mount in claims):
            raise ConfigError(
                "path that no volume holds",
                got=path,
                expected=f"one below {' or '.join(claims) or 'a mounted volume'}",
                fix="give --kubernetes.volumes CLAIM:/MOUNT, and paths as the pods see them",
            )
    configmap: Manifest = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-config", "namespace": settings.namespace},
        "data": {"config.yaml": to_yaml(training)},
    }
    match settings.manifest:
        case "job":
            address = f"{name}-0.{name}.{settings.namespace}"
            command = pod_command(
                config, processes, run, flags, "$(JOB_COMPLETION_INDEX)", address, str(PORT)
            )
            return [configmap, _service(name, config), _job(name, config, processes, claims, command)]
        case "trainjob":
            place = ("$(PET_NODE_RANK)", "$(PET_MASTER_ADDR)", "$(PET_MASTER_PORT)")
            command = pod_command(config, processes, run, flags, *place)
            return [configmap, _trainjob(name, config, processes, claims, command)]
        case _:
            raise ConfigError("--kubernetes.manifest", got=settings.manifest)


def pod_command(
    config: LaunchConfig, processes: int, run: Path, flags: Sequence[str], node: str, address: str, port: str
) -> list[str]:
    """What a pod runs; Kubernetes fills in its own variables only, since every other $ is doubled.

    With --resume a pod that is started again goes on, and a new run begins at step 0.
    """
    literal = [
        config.python or "python",
        "-m",
        "vidworld",
        "launch",
        f"{CONFIG_FOLDER}/config.yaml",
        "--out",
        str(run),
        "--resume",
        "--nodes",
        str(config.nodes),
        "--gpus-per-node",
        str(processes),
        *(["--cpu"] if config.cpu else []),
        *flags,
    ]
    escaped = [argument.replace("$", "$$") for argument in literal]
    return [*escaped, "--node-rank", node, "--master-addr", address, "--master-port", port]


def object_name(run: str) -> str:
    """A name that Kubernetes takes: lower-case letters, digits and dashes, at most 50."""
    name = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")[:50].rstrip("-")
    if not name or not name[0].isalpha():
        name = f"run-{name}".rstrip("-")
    return name


def to_text(objects: Sequence[Manifest]) -> str:
    """YAML of several documents, with the settings as they stand in a file."""
    return yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, width=120)


class _Dumper(yaml.SafeDumper):
    """Strings of several lines as blocks."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def apply(text: str) -> None:
    """Hand the objects to kubectl."""
    if shutil.which("kubectl") is None:
        raise ConfigError(
            "kubectl is not here",
            fix="print the objects with --dry-run, and apply them where it is: kubectl apply -f",
        )
    done = subprocess.run(["kubectl", "apply", "-f", "-"], input=text, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError("kubectl refused the objects", got=done.stderr.strip())
    print(done.stdout.strip())


def _claim(volume: str) -> tuple[str, str]:
    claim, colon, mount = volume.partition(":")
    if not colon or object_name(claim) != claim or not mount.startswith("/"):
        raise ConfigError("--kubernetes.volumes", got=volume, expected="CLAIM:/MOUNT")
    return mount.rstrip("/") or "/", claim


def _volumes(name: str, claims: dict[str, str], shm_gib: int) -> tuple[list[Manifest], list[Manifest]]:
    volumes: list[Manifest] = [
        {"name": "vidworld-config", "configMap": {"name": f"{name}-config"}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shm_gib}Gi"}},
    ]
    mounts: list[Manifest] = [
        {"name": "vidworld-config", "mountPath": CONFIG_FOLDER, "readOnly": True},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    for number, (mount, claim) in enumerate(claims.items()):
        volumes.append({"name": f"volume-{number}", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": f"volume-{number}", "mountPath": mount})
    return volumes, mounts


def _resources(config: LaunchConfig, processes: int) -> Manifest:
    return {} if config.cpu else {"limits": {"nvidia.com/gpu": processes}}


def _environment(config: LaunchConfig) -> list[Manifest]:
    pairs = [pair.partition("=")[::2] for pair in config.env]
    return [{"name": name, "value": value.replace("$", "$$")} for name, value in pairs]


def _service(name: str, config: LaunchConfig) -> Manifest:
    """Names for the pods; published before they are ready, since they become so by finding each other."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": config.kubernetes.namespace},
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {"batch.kubernetes.io/job-name": name},
            "ports": [{"name": "rendezvous", "port": PORT, "protocol": "TCP"}],
        },
    }


def _job(
    name: str, config: LaunchConfig, processes: int, claims: dict[str, str], command: list[str]
) -> Manifest:
    volumes, mounts = _volumes(name, claims, config.kubernetes.shm_gib)
    container = {
        "name": "trainer",
        "image": config.kubernetes.image,
        "command": command,
        "env": _environment(config),
        "resources": _resources(config, processes),
        "volumeMounts": mounts,
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "namespace": config.kubernetes.namespace},
        "spec": {
            "completionMode": "Indexed",
            "completions": config.nodes,
            "parallelism": config.nodes,
            # A lost pod costs the others their neighbour: each fault counts once for every pod.
            "backoffLimit": 10 * config.nodes,
            "podFailurePolicy": {
                "rules": [
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                    # A mistake in the input, and a training that diverged, would only repeat themselves.
                    {
                        "action": "FailJob",
                        "onExitCodes": {"containerName": "trainer", "operator": "In", "values": [2, 4]},
                    },
                ]
            },
            "template": {
                "metadata": {"labels": {"app": "vidworld"}},
                "spec": {
                    "subdomain": name,
                    "restartPolicy": "Never",
                    "terminationGracePeriodSeconds": GRACE_S,
                    "containers": [container],
                    "volumes": volumes,
                },
            },
        },
    }


def _trainjob(
    name: str, config: LaunchConfig, processes: int, claims: dict[str, str], command: list[str]
) -> Manifest:
    volumes, mounts = _volumes(name, claims, config.kubernetes.shm_gib)
    pod = {
        "terminationGracePeriodSeconds": GRACE_S,
        "containers": [{"name": "node", "volumeMounts": mounts}],
        "volumes": volumes,
    }
    jobs = [{"name": "node", "template": {"spec": {"template": {"spec": pod}}}}]
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": name, "namespace": config.kubernetes.namespace},
        "spec": {
            "runtimeRef": {
                "apiGroup": "trainer.kubeflow.org",
                "kind": "ClusterTrainingRuntime",
                "name": config.kubernetes.runtime,
            },
            "trainer": {
                "image": config.kubernetes.image,
                "command": command,
                "numNodes": config.nodes,
                "numProcPerNode": processes,
                "resourcesPerNode": _resources(config, processes),
                "env": _environment(config),
            },
            "runtimePatches": [
                {
                    "manager": "vidworld.io/launch",
                    "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": jobs}}},
                }
            ],
        },
    }
