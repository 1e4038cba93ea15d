"""The command line: each command parses its options, calls a Python function and prints the result."""
