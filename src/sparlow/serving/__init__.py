"""Compressed models inside servers of others: it needs torch and the kernel, and leaves transformers to the server."""
