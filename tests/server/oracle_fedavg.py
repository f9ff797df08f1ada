"""Federated averaging in plain numpy, with nothing of Flower and nothing of Trellis: what every grid must compute.

The average is a running mean in the clients' order, so that it can be compared bit by bit:
after weights n_1 .. n_i with sum N, mean += (x_i - mean) * n_i / N.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

Weights = dict[str, np.ndarray]
Train = Callable[[int, int, Weights], Weights]


def average(updates: Sequence[Weights], counts: Sequence[int]) -> Weights:
    """Return the mean of the clients' weights, each client counting as often as it has examples."""
    mean = {name: values.copy() for name, values in updates[0].items()}
    total = counts[0]
    for update, count in zip(updates[1:], counts[1:], strict=True):
        total += count
        for name, values in update.items():
            mean[name] = mean[name] + (values - mean[name]) * (count / total)
    return mean


def fedavg(initial: Weights, train: Train, cohorts: Sequence[Sequence[int]], examples: Mapping[int, int]) -> Weights:
    """Run FedAvg (McMahan et al. 2017, algorithm 1).

    Args:
        initial: the first global model.
        train: ``(client, round, weights) -> weights``, the local training; rounds count from one.
        cohorts: for every round the clients that train, in the order of their replies.
        examples: for every client its number of examples.
    """
    weights = initial
    for number, cohort in enumerate(cohorts, start=1):
        updates = [train(client, number, weights) for client in cohort]
        weights = average(updates, [examples[client] for client in cohort])
    return weights
