"""The version of the package."""

from importlib.metadata import PackageNotFoundError, version


def own_version() -> str:
    """The version of sparlow; ``unknown`` where it is imported from its sources without being installed."""
    try:
        return version("sparlow")
    except PackageNotFoundError:
        return "unknown"
