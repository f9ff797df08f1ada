"""A model file's graph that also says which batch-norm statistics it used, for statistics that move with a stream."""

from __future__ import annotations

from trellis_clients.edge.folding import MIXING
from trellis_clients.edge.model_file import ModelFile
from trellis_clients.edge.onnx_messages import Model


def mixed_outputs(file: ModelFile) -> dict[str, str]:
    """Return for every source statistic by name the value in the graph that holds the mixed one."""
    found = {}
    for name in file.about.statistics:
        prefix, _, kind = name.rpartition("running_")
        found[name] = f"{MIXING}{prefix}running_mean/chosen_{kind}"
    return found


def with_mixed_outputs(file: ModelFile) -> bytes:
    """Return the adaptive graph with the mixed statistics among its outputs."""
    model = Model.FromString(file.blob)
    for value in mixed_outputs(file).values():
        model.graph.output.add(name=value)
    blob: bytes = model.SerializeToString()
    return blob
