"""Adaptation: from annotated scans to an adapter."""
