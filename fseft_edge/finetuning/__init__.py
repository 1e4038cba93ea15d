"""Fine-tuning of the encoder itself: few of its parameters (parameter-efficient), its decoder, or all of them."""
