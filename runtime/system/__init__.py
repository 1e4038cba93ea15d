"""The machine and its files: memory, libraries, atomic writes, progress. Nothing here knows what a scan is."""
