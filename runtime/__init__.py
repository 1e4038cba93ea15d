"""Ground floor: from a CT on disk to cached feature maps. No training, no command line."""
