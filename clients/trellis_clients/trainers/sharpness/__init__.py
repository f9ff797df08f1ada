"""Local training that looks for flat minima.

``sam`` (Foret et al., ICLR 2021) is the reference: it descends from the worst point nearby, at twice the cost of a
step. ``esam`` (Du et al., ICLR 2022) makes that cheaper; ``saf`` and ``mesa-saf`` (Du et al., NeurIPS 2022) do without
it and hold the outputs near those of the model's own past. ``_perturbation`` and ``_trajectory`` are what each pair
shares.
"""
