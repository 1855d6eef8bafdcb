"""Our flags on a parser of their own."""

import argparse

from megatron_patch.upstream import flags


def parser() -> argparse.ArgumentParser:
    """A parser with our flags alone."""
    return flags.add_arguments(argparse.ArgumentParser(allow_abbrev=False))
