"""Experiments that test the paper's claims with a small model, on generated preference pairs or on your own."""
