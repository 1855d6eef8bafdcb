"""How the commands with a command line of their own say what they do."""

import argparse


def command_parser(started: str, description: str | None, example: str) -> argparse.ArgumentParser:
    """Return a parser without arguments.

    Args:
        started: how the user called the command, e.g. ``"megatron-patch sweep"``; usage and example repeat it.
        description: what the command does.
        example: printed as it stands at the end of ``--help``, ``{started}`` filled in.
    """
    return argparse.ArgumentParser(
        prog=started,
        description=description,
        epilog=example.format(started=started),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
