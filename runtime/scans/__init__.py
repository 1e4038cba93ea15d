"""CT scans and label maps: reading, geometry, the grid that the encoder works on, writing."""
