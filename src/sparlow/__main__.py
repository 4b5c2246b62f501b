"""``python -m sparlow`` is the command ``sparlow``."""

from sparlow.cli.commands import main

main()
