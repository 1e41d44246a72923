"""Relevance: where an output comes from."""
