"""Code written by `make protos`."""
