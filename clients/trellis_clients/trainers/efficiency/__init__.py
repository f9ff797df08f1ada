"""Training for less: memory, time and energy."""
