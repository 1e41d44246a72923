"""The command line: thin, calls the functions that a user would call."""
