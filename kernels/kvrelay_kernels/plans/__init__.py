"""Compiled plans by canonical key, built once and kept: in the process, on its disk, and in the fleet.

plans = open_plans(folder)                               # once a process, from its config
cache = PlanCache[Graph](plans, capacity=64, close=...)  # one for each kind of live object
key = GraphKey.of("cudnn.sdpa", device, tensors=..., mask=..., attributes=..., libraries=...)
plan = cache.get(key, build, dump, load)                 # keep `plan` for as long as `plan.value` is used
"""

from kvrelay_kernels.plans.cache import PlanCache
from kvrelay_kernels.plans.counts import LIVE, PlanCounts
from kvrelay_kernels.plans.folder import FolderBlobs, FolderLocks
from kvrelay_kernels.plans.key import DeviceClass, GraphKey, MaskKey, TensorKey
from kvrelay_kernels.plans.plan import Plan
from kvrelay_kernels.plans.store import Blobs, Locks, PlanStore, Tier, default_plan_folder, open_plans

__all__ = [
    "LIVE",
    "Blobs",
    "DeviceClass",
    "FolderBlobs",
    "FolderLocks",
    "GraphKey",
    "Locks",
    "MaskKey",
    "Plan",
    "PlanCache",
    "PlanCounts",
    "PlanStore",
    "TensorKey",
    "Tier",
    "default_plan_folder",
    "open_plans",
]
