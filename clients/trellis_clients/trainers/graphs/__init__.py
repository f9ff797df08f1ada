"""Learning on graphs: every client holds a subgraph."""
