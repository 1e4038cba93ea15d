"""Export of a checkpoint to an encoder bundle: weights, ONNX graphs, compiled engines, parity reports."""
