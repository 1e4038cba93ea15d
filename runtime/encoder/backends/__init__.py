"""Inference backends, one module per library. A backend imports its library only when a session is opened."""
