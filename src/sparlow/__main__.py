"""``python -m sparlow`` is the command ``sparlow``."""

import sys

INTERRUPTED = 130  # 128 and the number of the signal, as shells count


def main() -> None:
    """Run the command line; Ctrl-C while it is being imported is no reason for a traceback."""
    try:
        from sparlow.cli.commands import main as run
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    run()


if __name__ == "__main__":
    main()
