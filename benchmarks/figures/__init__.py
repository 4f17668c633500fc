"""Pictures of the formulas and of runs."""
