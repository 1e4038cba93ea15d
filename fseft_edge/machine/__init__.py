"""This machine: what it can run (``doctor``), and how fast and in how much memory (``benchmark``)."""
