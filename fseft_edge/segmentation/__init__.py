"""Segmentation: from CT scans and adapters to masks on disk. Start at ``segment.py``."""
