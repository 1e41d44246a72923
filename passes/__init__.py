"""Built-in passes, one file or folder each; found by `graphopt.registry`."""
