"""hyperparameters.json: the LR, weight decay and eps of every parameter; its types and its reader.

Its content is built in `megatron_patch.upstream.record`, from the live optimizer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_patch.files.whole import as_written, read_json

HYPERPARAMETERS_JSON = "hyperparameters.json"


@dataclass(frozen=True)
class Parameter:
    """One parameter of the model with its peak LR and its weight decay."""

    name: str
    role: str
    """Its class: matrix, output, embedding or vector."""
    shape: tuple[int, ...]
    m: float
    lr: float
    weight_decay: float
    eps: float | None
    """None: its optimizer has none."""
    optimizer: str = "adam"


@dataclass(frozen=True)
class HyperparameterTable:
    """The content of the file."""

    rule: str
    exponents: tuple[float, ...]
    base: Mapping[str, Any]
    source: str
    parameters: tuple[Parameter, ...]

    @classmethod
    def read(cls, path: str) -> "HyperparameterTable":
        """Read a file.

        Raises:
            OSError: it cannot be read.
            NotAsWritten: it is JSON, but of another form.
            ValueError: it is not JSON.
        """
        content = read_json(path)
        with as_written():
            parameters = tuple(
                Parameter(
                    str(p["name"]),
                    str(p["class"]),
                    tuple(int(n) for n in p["shape"]),
                    m=float(p["m"]),
                    lr=float(p["lr"]),
                    weight_decay=float(p["weight_decay"]),
                    eps=None if p["eps"] is None else float(p["eps"]),
                    optimizer=str(p.get("optimizer", "adam")),
                )
                for p in content["parameters"]
            )
            return cls(
                str(content["rule"]),
                tuple(float(x) for x in content["exponents"]),
                dict(content["base"]),
                str(content["source"]),
                parameters,
            )
