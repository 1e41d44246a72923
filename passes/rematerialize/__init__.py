"""Rematerialization: keep a memory budget by recomputing values in the backward pass."""
