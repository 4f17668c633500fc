"""Benchmarks of time and memory: of the loss, the language-model head and a trainer's step."""
