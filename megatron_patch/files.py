"""Writing small files so that a reader never sees half of one."""

import json
import os
from typing import Any


def write_json(path: str, content: Any) -> None:
    """Write `content` as indented JSON under `path`, replacing an older file in one step; makes the folder.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def read_json(path: str) -> Any:
    """Return the content of a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON.
    """
    with open(path, encoding="utf-8") as file:
        return json.load(file)
