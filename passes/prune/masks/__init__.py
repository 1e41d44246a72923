"""Masks: weights that are zero, in operators of the sizes that they had."""
