"""Compressed bytes that are the same at any time, since the names of parametrised tests have them."""

import gzip


def gzipped(content: bytes) -> bytes:
    """Compress without the time, which pytest-xdist would take for other tests in every worker."""
    return gzip.compress(content, mtime=0)
