"""Segmentation: from CT scans and adapter files to mask files. Start reading at ``segment.py``."""
