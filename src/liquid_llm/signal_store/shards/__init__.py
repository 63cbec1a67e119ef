"""Shards: thousands of records a file."""
