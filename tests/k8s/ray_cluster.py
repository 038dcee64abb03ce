"""The fields of KubeRay's RayCluster that we use, as a JSON schema: any other one fails."""

from typing import Any

QUANTITIES = {"type": "object", "additionalProperties": {"type": "string"}}


def strict(required: tuple[str, ...], **properties: Any) -> dict[str, Any]:
    """An object with no other properties than these."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


# The pod's own spec is checked against Kubernetes' schema, as a PodTemplateSpec.
TEMPLATE = strict(("metadata", "spec"), metadata={"type": "object"}, spec={"type": "object"})
HEAD = strict(("rayStartParams", "template"), rayStartParams=QUANTITIES, template=TEMPLATE)
WORKERS = strict(
    ("groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"),
    groupName={"type": "string", "pattern": "^[a-z0-9-]+$"},
    replicas={"type": "integer", "minimum": 0},
    minReplicas={"type": "integer", "minimum": 0},
    maxReplicas={"type": "integer", "minimum": 0},
    rayStartParams=QUANTITIES,
    template=TEMPLATE,
)
RAY_CLUSTER = strict(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayCluster"},
    metadata={"type": "object"},
    spec=strict(
        ("rayVersion", "headGroupSpec", "workerGroupSpecs"),
        rayVersion={"type": "string"},
        authOptions=strict(("mode",), mode={"enum": ["disabled", "token"]}),
        headGroupSpec=HEAD,
        workerGroupSpecs={"type": "array", "items": WORKERS, "minItems": 1},
    ),
)
