"""Raw inputs of named datasets, streamed into the JSONL shards that ``data/records`` reads.

catalog     ``datasets.yaml``: name -> type, raw inputs, where the shards go (``catalog``)
input       one raw file, of any known format (``formats``; ``streams`` cuts it, ``layouts`` finds the text in it)
document    one text out of an input; a reject is a piece that is no document, with place and reason
shard       a JSONL file of ``{"text", "type", "sample_id"}`` lines (``shards``)
marker      ``complete.json``, written after everything else: only what it names counts (``dataset``)
"""
