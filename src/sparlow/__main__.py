"""``python -m sparlow`` is the command ``sparlow``."""

import sys

INTERRUPTED = 130  # 128 and the number of the signal, as shells count


def main() -> None:
    """Run the command line; neither Ctrl-C nor a lack of memory while it is imported is a reason for a traceback."""
    try:
        from sparlow.cli.commands import main as run
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except MemoryError:  # this early nothing else can be imported to say so
        sys.exit("error: There is too little main memory to begin. Close other programs, then repeat the command.")
    run()


if __name__ == "__main__":
    main()
