"""Speed and memory of encoders on this machine. The twin of ``fseft-edge benchmark`` is in ``runs.py``."""
