"""How types of values are called in records and tables."""

MODEL = "model"  # the type of the model's weights


def shown_values(value_type: str, levels: str | None, group: int | None) -> str:
    """Return a type of values for tables: ``model``, or ``int4 half, 128 columns a scale``."""
    return value_type if levels is None else f"{value_type} {levels}, {group or 'all'} columns a scale"
