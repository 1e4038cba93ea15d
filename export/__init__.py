"""From a checkpoint to an encoder bundle: networks that return feature pyramids, ONNX export, parity."""
