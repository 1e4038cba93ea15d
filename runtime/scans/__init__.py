"""CT scans and label maps: reading, writing, geometry, and resampling to the grid of the encoder."""
