"""Trellis: federated and edge-cloud learning from one scenario file, simulated or deployed."""

__version__ = "0.1.0"
