"""The command line: ``cogprep``, and ``python -m cogprep``.

It imports nothing but what Ctrl-C may interrupt without a word, and the rest then.
"""

from cogcommon.cli.beginning import ending_silently


def main() -> None:
    """The program, which ends this process."""
    with ending_silently():
        from .cli import main as run
    run()


if __name__ == "__main__":
    main()
