"""One run from its checks to its report; ``pipeline`` is the bridge between the mathematics and the models."""
