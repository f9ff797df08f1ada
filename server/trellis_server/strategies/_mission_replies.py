"""What a client's answer to a mission holds, read: evidence, pictures, and metrics that can be added up."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import ArrayRecord, Message
from numpy.typing import NDArray

from trellis import flower, records
from trellis_server.prototypes import Evidence

MISSION = "mission"
"""Action of a ``train.mission`` message, and the key of its config that says which mission it is, from 1."""
EVIDENCE = "evidence"
EXEMPLARS = "exemplars"
GROUPS = ("base", "field", "own")
MAX_JUDGED = 1 << 40


def client_of(reply: Message) -> int:
    return flower.client_of(reply.metadata.src_node_id)


def evidence_of(reply: Message) -> Evidence:
    """Return a reply's evidence, unchecked."""
    arrays = records.array_records(reply.content)[EVIDENCE]
    return as_evidence({name: records.view(array) for name, array in arrays.items()})


def as_evidence(values: Mapping[str, NDArray[Any]]) -> Evidence:
    return Evidence(values["labels"], values["counts"], values["means"], int(values["version"]))


def pictures_of(reply: Message) -> dict[str, NDArray[Any]]:
    """Return a reply's images ``x`` and labels ``y``; nothing where it holds none."""
    arrays = records.array_records(reply.content).get(EXEMPLARS, ArrayRecord())
    return {name: records.view(array) for name, array in arrays.items()}


def metrics_of(reply: Message) -> Mapping[str, Any]:
    return records.metric_records(reply.content)[records.METRICS]


def metrics_problem(reply: Message) -> str | None:
    """Return what is wrong with the metrics that ``pooled`` adds up, as ``"code: reason"``, or None."""
    found = records.metric_records(reply.content).get(records.METRICS)
    metrics: Mapping[str, Any] = {} if found is None else found
    for group in GROUPS:
        right, total = metrics.get(f"right-{group}"), metrics.get(f"total-{group}")
        if not (isinstance(right, int) and isinstance(total, int) and 0 <= right <= total <= MAX_JUDGED):
            return f"metrics: right-{group} is {right!r:.40} and total-{group} is {total!r:.40}"
    for name in ("accuracy", "loss"):
        value = metrics.get(name)
        if not isinstance(value, int | float) or not math.isfinite(value):
            return f"metrics: {name} is {value!r:.40}"
    if not isinstance(metrics.get("classes", 0), int):
        return f"metrics: classes is {metrics['classes']!r:.40}"
    return None


def pooled(replies: Iterable[Message]) -> dict[str, float]:
    """Return metrics over all replies.

    Accuracies by groups come from counts, so that a client with few examples of a group counts little; accuracy and
    loss are means, weighted by the examples judged; ``classes`` is the sum of the classes that clients were shown.
    """
    tallies: dict[str, int] = defaultdict(int)
    sums: dict[str, float] = defaultdict(float)
    weight = shown = 0
    for metrics in map(metrics_of, replies):
        judged = metrics["total-base"] + metrics["total-field"]
        weight, shown = weight + judged, shown + metrics.get("classes", 0)
        for group in GROUPS:
            for name in (f"right-{group}", f"total-{group}"):
                tallies[name] += metrics[name]
        for name in ("accuracy", "loss"):
            sums[name] += judged * metrics[name]
    result = {name: total / weight for name, total in sums.items()} if weight else {}
    for group in GROUPS:
        if tallies[f"total-{group}"]:
            result[f"accuracy-{group}"] = tallies[f"right-{group}"] / tallies[f"total-{group}"]
    return {**result, "classes": shown} if shown else result
