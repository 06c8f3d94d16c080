"""The files in cluster/: well-formed, of the versions we pin, and with command lines that rayft accepts."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ray.serve.schema import ServeDeploySchema
from ruamel.yaml import YAML

from rayft.config import load

ROOT = Path(__file__).parents[2]
RAY = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]  # type: ignore[index]  # it is there


def read(name: str) -> Any:
    return YAML(typ="safe", pure=True).load(ROOT / "cluster" / name)


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The recipe and overrides of a `rayft` command line, loaded as the command would."""
    monkeypatch.chdir(ROOT)
    options = {"--resume", "--overwrite", "--new"}
    plain = [word for word in words if word not in options]
    assert plain[0] == "examples/recipes/quickstart.yaml" and all("=" in word for word in plain[1:])
    return load(plain[0], plain[1:]).recipe


def test_kuberay_job(monkeypatch: pytest.MonkeyPatch) -> None:
    job = read("kuberay-rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == RAY and cluster["authOptions"]["mode"] == "token"
    assert f"rayproject/ray:{RAY}" in (ROOT / "cluster" / "kuberay-rayjob.yaml").read_text()
    (group,) = cluster["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    gpus = int(worker["resources"]["limits"]["nvidia.com/gpu"]) * group["replicas"]
    mounts = {mount["mountPath"] for mount in worker["volumeMounts"]}

    shell = shlex.split(job["spec"]["entrypoint"])
    assert shell[:2] == ["sh", "-c"]
    command = shell[2].split("&&")[1].split()
    assert command[:3] == ["python", "-m", "rayft.train"]
    recipe = check_command(command[3:], monkeypatch)
    assert recipe.scale.workers == gpus and recipe.scale.device == "gpu" and recipe.storage in mounts
    assert "RAY_JOB_STOP_WAIT_TIME_S" in YAML(typ="safe").load(job["spec"]["runtimeEnvYAML"])["env_vars"]


def test_vm_autoscaler(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray.autoscaler

    cluster = read("aws-autoscaler.yaml")
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)
    assert cluster["head_node_type"] in cluster["available_node_types"]
    text = (ROOT / "cluster" / "aws-autoscaler.yaml").read_text()
    command = re.search(r"rayft submit (.+) --address", text)
    assert command is not None
    recipe = check_command(command[1].split(), monkeypatch)
    assert recipe.scale.workers <= cluster["available_node_types"]["gpu"]["max_workers"]
    starts = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    assert all("RAY_AUTH_MODE=token" in line for line in starts if "ray start" in line)


def test_kuberay_service() -> None:
    service = read("kuberay-rayservice.yaml")
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    cluster = service["spec"]["rayClusterConfig"]
    assert cluster["rayVersion"] == RAY and cluster["authOptions"]["mode"] == "token"
    (group,) = cluster["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    mounts = {mount["mountPath"] for mount in worker["volumeMounts"]}

    (app,) = ServeDeploySchema.model_validate(YAML(typ="safe").load(service["spec"]["serveConfigV2"])).applications
    module, _, function = app.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert app.args["sources"] == ["run:quickstart"]
    recipe = load(str(ROOT / "examples/recipes/quickstart.yaml"), app.args["overrides"]).recipe
    assert recipe.storage in mounts and recipe.serve.api_keys is not None
    assert recipe.serve.replicas == (group["minReplicas"], group["maxReplicas"])


@pytest.mark.parametrize("name", ["kuberay-rayjob.yaml", "kuberay-rayservice.yaml", "aws-autoscaler.yaml"])
def test_headers_say_what_was_not_tried(name: str) -> None:
    assert "Not yet run on a real cluster" in (ROOT / "cluster" / name).read_text()
