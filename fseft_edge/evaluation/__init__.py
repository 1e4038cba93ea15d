"""Evaluation: the agreement of masks with reference contours."""
