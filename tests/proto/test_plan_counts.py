"""A worker's status carries every counter of its plans."""

from collections import Counter
from dataclasses import fields

from kvrelay.v1 import worker_pb2
from kvrelay_kernels.plans import PlanCounts


def test_every_counter_has_its_field() -> None:
    counts = PlanCounts(Counter(live=7, disk=2), *range(3, 3 + len(fields(PlanCounts)) - 1))
    message = worker_pb2.PlanCounts(**vars(counts))
    assert {field.name for field in message.DESCRIPTOR.fields} == {field.name for field in fields(counts)}
    assert dict(message.hits) == {"live": 7, "disk": 2}
    assert (message.misses, message.builds, message.load_seconds) == (3, counts.builds, counts.load_seconds)
