"""Lesion and reordering studies of residual networks: thousands of variants of a trained network in one call."""
