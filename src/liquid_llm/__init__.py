"""Distil small language models from larger ones: online and stored teachers in one run."""
