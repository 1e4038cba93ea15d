"""Inference backends, one file each; every one imports its library only when it is opened."""
