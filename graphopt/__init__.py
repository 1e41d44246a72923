"""graphopt: graph transformations for PyTorch models under a budget."""
