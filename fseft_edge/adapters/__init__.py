"""Adapters: the small networks that learn on cached features, and the file that holds one."""
