"""The edge side of Trellis: what a client does with its data."""
