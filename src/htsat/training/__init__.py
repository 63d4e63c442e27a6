"""Training: recipe, loop, run folder."""
