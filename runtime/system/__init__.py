"""Access to the machine and its files: memory, libraries, atomic writing, progress. It is independent of scans."""
