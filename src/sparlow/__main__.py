"""``python -m sparlow`` is the command ``sparlow``."""

from sparlow.cli import main

main()
