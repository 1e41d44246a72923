"""Secure computation."""
