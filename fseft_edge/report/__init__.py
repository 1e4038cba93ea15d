"""Pictures of segmentations and HTML pages."""
