"""From feature maps to masks: prediction, decision, post-processing and quality flags."""
