"""Stores of teacher signal: records, codecs, layouts. Knows no model."""
