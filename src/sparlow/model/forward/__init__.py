"""Let text pass through the decoder blocks: find them, capture how they are called, observe their inputs."""
