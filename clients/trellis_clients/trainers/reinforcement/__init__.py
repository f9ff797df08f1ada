"""Learning from the transitions of an environment."""
