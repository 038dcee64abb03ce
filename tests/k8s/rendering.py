"""A strict reading of the kustomizations that we write: what is not understood here fails."""

from pathlib import Path
from typing import Any

import yaml

BASE = Path(__file__).parents[2] / "k8s" / "base"
KNOWN = {"apiVersion", "kind", "namespace", "resources"}
CLUSTER_WIDE = {"Namespace"}

Manifest = dict[str, Any]


def render(folder: Path) -> list[Manifest]:
    """The manifests of a kustomization, as `kubectl kustomize` would print them, in no particular order."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    unknown = kustomization.keys() - KNOWN
    if unknown:
        raise ValueError(f"this test cannot render {sorted(unknown)}")
    files = sorted(path.name for path in folder.glob("*.yaml") if path.name != "kustomization.yaml")
    if sorted(kustomization["resources"]) != files:
        raise ValueError(f"the folder holds {files}, the kustomization {kustomization['resources']}")
    manifests = [one for name in files for one in yaml.safe_load_all((folder / name).read_text())]
    for manifest in manifests:
        if manifest["kind"] not in CLUSTER_WIDE:
            manifest["metadata"]["namespace"] = kustomization["namespace"]
    return manifests


def pod_specs(manifests: list[Manifest]) -> list[tuple[str, Manifest, Manifest]]:
    """Name, labels and spec of every pod that the manifests make."""
    found: list[tuple[str, Manifest]] = []
    for manifest in manifests:
        spec = manifest.get("spec", {})
        if manifest["kind"] == "Deployment":
            found.append((manifest["metadata"]["name"], spec["template"]))
        if manifest["kind"] == "RayCluster":
            found.append(("head", spec["headGroupSpec"]["template"]))
            found.extend((group["groupName"], group["template"]) for group in spec["workerGroupSpecs"])
    return [(name, template["metadata"]["labels"], template["spec"]) for name, template in found]
