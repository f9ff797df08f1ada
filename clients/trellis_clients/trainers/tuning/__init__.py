"""Fitting a frozen, pretrained model to new data by few parameters."""
