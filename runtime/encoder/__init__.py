"""The frozen encoder: its bundle, its backends, and the feature map of a scan."""
