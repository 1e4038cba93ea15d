"""Frozen encoder: bundles, backends, and feature maps of scans."""
