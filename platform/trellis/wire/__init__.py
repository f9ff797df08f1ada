"""The link's formats and credentials. Imports neither Flower nor torch: an edge device has neither."""
