"""The text that the runs train on: bytes of the Python standard library, which is on every machine.

Run as a program with the prefix of the files to write, since it imports Megatron.
"""

import glob
import os
import sys
import sysconfig

VOCABULARY = 256
LENGTH = 2 * 2**20
"""Bytes."""


def write_corpus(prefix: str) -> None:
    """Write a dataset of Megatron's, ``prefix.bin`` and ``prefix.idx``: one document a file, one token a byte.

    Raises:
        RuntimeError: the standard library's source is not there.
        OSError: the folder cannot be written to.
    """
    import torch

    from megatron_patch.upstream.datasets import indexed_dataset_builder

    folder = sysconfig.get_paths()["stdlib"]
    builder = indexed_dataset_builder(f"{prefix}.bin", VOCABULARY)
    left = LENGTH
    for path in sorted(glob.glob(os.path.join(folder, "*.py"))):
        with open(path, "rb") as file:
            content = file.read(left)
        if content:
            builder.add_document(torch.frombuffer(bytearray(content), dtype=torch.uint8), [len(content)])
        left -= len(content)
    if left > LENGTH / 2:
        raise RuntimeError(f"hardly any source of the standard library in {folder}: there is nothing to train on")
    builder.finalize(f"{prefix}.idx")


if __name__ == "__main__":
    write_corpus(sys.argv[1])
