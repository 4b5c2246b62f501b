"""Train what a compressed block keeps towards the dense model."""
