"""Learning classes that arrive one after another, without forgetting the earlier ones."""
