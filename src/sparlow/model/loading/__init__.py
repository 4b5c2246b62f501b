"""Open a model: from its config alone, whole, or one block at a time."""
