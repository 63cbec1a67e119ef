"""From a manifest or a named dataset to micro-batches."""
