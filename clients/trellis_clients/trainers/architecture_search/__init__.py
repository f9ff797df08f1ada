"""Looking for a network while training it."""
