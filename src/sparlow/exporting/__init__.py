"""A compressed model in the forms that other programs read: one file a form, all listed in the registry."""
