"""Execution of programs whose backward pass is planned."""
