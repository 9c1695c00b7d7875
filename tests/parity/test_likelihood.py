"""Sampling beside transformers, windows and whole tasks beside lm_eval."""
