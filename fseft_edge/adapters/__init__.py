"""Adapters: small networks that are trained on cached features, and the adapter file."""
