"""What methods on graphs share: a client's subgraph as a sparse matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def subgraph(edges: Tensor, rows: Tensor) -> Tensor:
    """Return the edges among some nodes, in their own numbering.

    Args:
        edges: ``(2, E)``, pairs of row numbers.
        rows: ``(n,)``, the nodes, in the order that the result numbers them by.

    Returns:
        ``(2, E')``, pairs of positions in ``rows``.
    """
    size = int(max(edges.amax() if edges.numel() else -1, rows.amax() if len(rows) else -1)) + 1
    place = torch.full((size,), -1, dtype=torch.int64, device=rows.device)
    place[rows] = torch.arange(len(rows), device=rows.device)
    found = place[edges]
    return found[:, (found >= 0).all(0)]


def adjacency(edges: Tensor, nodes: int) -> Tensor:
    """Return D^-1 (A + I) + I as a sparse matrix ``(nodes, nodes)``; D holds the row sums of A + I.

    A node's own features count twice, once among its neighbours' mean: the rows sum to 2.
    """
    own = torch.arange(nodes, device=edges.device)
    pairs = torch.cat([edges, torch.stack([own, own])], 1)
    degree = torch.bincount(pairs[0], minlength=nodes).float()
    values = torch.cat([1 / degree[pairs[0]], torch.ones(nodes, device=edges.device)])
    pairs = torch.cat([pairs, torch.stack([own, own])], 1)
    return torch.sparse_coo_tensor(pairs, values, (nodes, nodes), check_invariants=False).coalesce()


def aggregate(matrix: Tensor, x: Tensor) -> Tensor:
    """Return the product of a sparse ``(n, n)`` and a dense ``(n, D)`` matrix: each node's sum over its neighbours."""
    product: Tensor = torch.sparse.mm(matrix, x)
    return product
