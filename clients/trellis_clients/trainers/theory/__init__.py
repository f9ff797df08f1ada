"""Numerical experiments: objectives that are formulas, methods compared by what they cost."""
