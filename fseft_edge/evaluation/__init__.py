"""Evaluation: how well masks agree with reference contours."""
