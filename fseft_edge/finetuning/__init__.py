"""Fine-tuning of an encoder: a few parameters (parameter-efficient), the decoder, or all parameters."""
