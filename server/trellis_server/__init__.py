"""The cloud side of Trellis: strategies, and the loop that runs them over a grid."""
