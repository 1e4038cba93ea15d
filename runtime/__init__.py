"""Base layer: from a CT on disk to a cached feature map. It contains no training and no command line."""
