"""The manifests: rendered, valid, and in agreement with the program that they start."""

import json
import shlex
import shutil
import subprocess
import tomllib

import jsonschema
import kubernetes_validate
import pytest
import typer
import yaml

from control_plane.app import app
from control_plane.config import KvrelayConfig, load
from tests.k8s.ray_cluster import RAY_CLUSTER
from tests.k8s.rendering import BASE, Manifest, pod_specs, render

ROOT = BASE.parents[1]


@pytest.fixture(scope="module")
def manifests() -> list[Manifest]:
    """The base, rendered."""
    return render(BASE)


@pytest.fixture
def config(manifests: list[Manifest], monkeypatch: pytest.MonkeyPatch) -> KvrelayConfig:
    """What `kvrelay serve` makes of the ConfigMap."""
    (found,) = (one for one in manifests if one["kind"] == "ConfigMap")
    for name, value in found["data"].items():
        monkeypatch.setenv(name, value)
    config = load()
    for name in found["data"]:
        group, _, setting = name.removeprefix("KVRELAY_").lower().partition("__")
        assert hasattr(getattr(config, group), setting), f"{name} sets nothing"
    return config


def by_name(manifests: list[Manifest]) -> list[Manifest]:
    return sorted(manifests, key=lambda one: (one["kind"], one["metadata"]["name"]))


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl here")
def test_kubectl_renders_the_same(manifests: list[Manifest]) -> None:
    printed = subprocess.run(["kubectl", "kustomize", str(BASE)], check=True, capture_output=True, text=True)
    assert by_name(list(yaml.safe_load_all(printed.stdout))) == by_name(manifests)


def test_core_kinds_fit_kubernetes_own_schemas(manifests: list[Manifest]) -> None:
    for manifest in manifests:
        if manifest["kind"] != "RayCluster":
            kubernetes_validate.validate(manifest, "1.33", strict=True)


def test_the_ray_cluster_fits_its_schema_and_its_pods_those_of_kubernetes(manifests: list[Manifest]) -> None:
    (cluster,) = (one for one in manifests if one["kind"] == "RayCluster")
    jsonschema.validate(cluster, RAY_CLUSTER)
    for name, labels, spec in pod_specs([cluster]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels}, "spec": spec}
        kubernetes_validate.validate(pod, "1.33", strict=True)


def test_a_worker_group_offers_what_its_pool_asks_for(
    manifests: list[Manifest], config: KvrelayConfig
) -> None:
    (cluster,) = (one for one in manifests if one["kind"] == "RayCluster")
    offered = {
        # The operator pastes the value into a shell command.
        group["groupName"]: json.loads(shlex.split(group["rayStartParams"]["resources"])[0])
        for group in cluster["spec"]["workerGroupSpecs"]
    }
    assert offered == {"prefill": {"prefill": 1}, "decode": {"decode": 1}}
    replicas = {group["groupName"]: group["replicas"] for group in cluster["spec"]["workerGroupSpecs"]}
    assert replicas == {"prefill": config.prefill.workers, "decode": config.decode.workers}
    assert cluster["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_every_command_is_one_that_kvrelay_parses(manifests: list[Manifest]) -> None:
    command = typer.main.get_command(app)
    lines = [
        [*container.get("command", []), *container.get("args", [])]
        for _, _, spec in pod_specs(manifests)
        for container in spec["containers"]
    ]
    (docker,) = (line for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("CMD "))
    lines.append(json.loads(docker.removeprefix("CMD ")))
    ours = [line[1:] for line in lines if line and line[0] == "kvrelay"]
    assert ours
    for arguments in ours:
        context = command.make_context("kvrelay", list(arguments))
        name, sub, rest = command.resolve_command(context, arguments)  # type: ignore[attr-defined]
        assert name == "serve"
        sub.make_context("serve", rest, parent=context)


def test_addresses_name_services_and_ports_that_are_there(
    manifests: list[Manifest], config: KvrelayConfig
) -> None:
    services = {
        f"{one['metadata']['name']}:{port['port']}"
        for one in manifests
        if one["kind"] == "Service"
        for port in one["spec"]["ports"]
    }
    # KubeRay makes the head's service.
    (cluster,) = (one for one in manifests if one["kind"] == "RayCluster")
    services.add(f"{cluster['metadata']['name']}-head-svc:10001")
    assert config.transport.uri.removeprefix("redis://") in services
    assert (config.ray.address or "").removeprefix("ray://") in services
    assert f"kvrelay:{config.gateway.port}" in services


def test_services_select_pods_that_have_the_port(manifests: list[Manifest]) -> None:
    pods = pod_specs(manifests)
    for service in (one for one in manifests if one["kind"] == "Service"):
        selected = [
            {port["name"] for container in spec["containers"] for port in container.get("ports", [])}
            for _, labels, spec in pods
            if service["spec"]["selector"].items() <= labels.items()
        ]
        assert len(selected) == 1
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= selected[0]


def test_pods_run_without_root_and_without_service_links(manifests: list[Manifest]) -> None:
    for name, _, spec in pod_specs(manifests):
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        # The variables of service links begin as settings do.
        assert spec["enableServiceLinks"] is False, name
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, name


def test_the_image_is_this_version_everywhere(manifests: list[Manifest]) -> None:
    images = {container["image"] for _, _, spec in pod_specs(manifests) for container in spec["containers"]}
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert {image for image in images if image.startswith("kvrelay")} == {f"kvrelay:{version}"}


def test_the_image_holds_every_room() -> None:
    copied = {
        line.split()[1] for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("COPY ")
    }
    rooms = {path.parent.name for path in ROOT.glob("*_*/__init__.py")} | {"kernels", "proto"}
    assert rooms <= copied
