"""The two ways sparlow fails on purpose; everything else is a bug."""


class InputError(ValueError):
    """What the caller gave cannot be used; one sentence says what to do. The command line exits with 2."""


class RunError(RuntimeError):
    """A run that started well could not go on; one sentence says where and why. The command line exits with 1."""
