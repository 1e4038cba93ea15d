"""The command line: each command parses, calls its Python twin and prints."""
