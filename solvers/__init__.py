"""Optimisation problems on plain data. Nothing here imports torch."""
