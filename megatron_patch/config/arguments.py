"""Our flags as an argument group, for Megatron's parser and for --help."""

import argparse

from megatron_patch.config.settings import OPTIONS


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add every flag of this package to `parser` and return it.

    No flag may be called like a field of Megatron's config dataclasses: Megatron copies such attributes.
    """
    group = parser.add_argument_group(title="width transfer")
    for one in OPTIONS:
        if one.kind is bool:
            group.add_argument(one.flag, action="store_true", help=one.help)
        else:
            group.add_argument(one.flag, type=one.kind, choices=one.choices, default=one.default, help=one.help)
    return parser
