"""Diagnosis of this machine (``doctor``), and measurement of speed and memory (``benchmark``)."""
