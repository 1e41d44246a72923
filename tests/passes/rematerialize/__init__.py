"""Tests of the pass `rematerialize`."""
