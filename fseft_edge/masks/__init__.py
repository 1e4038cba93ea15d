"""From feature maps to masks: prediction, decision, post-processing, quality flags."""
