"""The compressed model on disk and in memory: layers, shards, checksums, transformers' quantizer."""
