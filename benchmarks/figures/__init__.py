"""Pictures of the margin formulas and of training runs."""
