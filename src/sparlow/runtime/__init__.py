"""Running what was compressed: layers that stay packed, the kernel that multiplies by them, and how a model is opened."""
