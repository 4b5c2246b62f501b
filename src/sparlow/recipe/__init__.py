"""What is done to a model: the recipe, and the arithmetic of what each layer keeps."""
