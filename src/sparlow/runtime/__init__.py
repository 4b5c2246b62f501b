"""Running what was compressed: layers that stay packed, their kernel, and the modes that a model is opened in."""
