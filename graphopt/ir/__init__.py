"""The captured program: graph, signature, aliasing, joint view, emission."""
