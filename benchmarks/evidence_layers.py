"""What the runs behind docs/evidence.md measured in their layers: docs/evidence/NAME/layers.csv."""

import csv
import math
import statistics
from pathlib import Path

from megatron_patch.report.drawing import LIGHT

HIDDEN = ("decoder.", "blocks.")
"""What the names of matrices begin with whose fan-in goes with the width, in a Transformer and a ResNet."""
Key = tuple[int, str]
"""Width and rule."""


def rows_of(path: Path) -> list[dict[str, str]]:
    """Return the rows of the matrices of one seed, the first."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["layer"].startswith(HIDDEN)]
    first = min((row["seed"] for row in rows), key=lambda seed: int(seed or 0))
    return [row for row in rows if row["seed"] == first]


class Measured:
    """The rows of a layers.csv of one seed and one LR.

    The LR is the nearest to the proxy's optimum of those that at most one width and rule lacks: the half octaves were
    not trained for all.
    """

    def __init__(self, path: Path, lr: float) -> None:
        rows = rows_of(path)
        trained: dict[float, set[Key]] = {}
        for row in rows:
            trained.setdefault(float(row["lr"]), set()).add((int(row["hidden_size"]), row["rule"]))
        most = max(map(len, trained.values()))
        common = [one for one, keys in trained.items() if len(keys) >= most - 1]
        self.lr = min(common, key=lambda one: abs(math.log2(one / lr)))
        self.rows = [row for row in rows if float(row["lr"]) == self.lr]
        self.keys: list[Key] = sorted({(int(row["hidden_size"]), row["rule"]) for row in self.rows})
        self.narrow = self.keys[0][0]

    def proxy_of(self, key: Key) -> Key:
        """Return the proxy of a width and rule: that of its rule, if the rule has one of its own."""
        own = (self.narrow, key[1])
        return own if own in self.keys else self.keys[0]

    def over_proxy(self, key: Key, column: str) -> dict[int, float]:
        """Return `median` over that of the proxy, at the iterations that both have."""
        base = self.median(self.proxy_of(key), column)
        return {i: value / base[i] for i, value in self.median(key, column).items() if i in base}

    def color(self, key: Key) -> str:
        """Return the colour of a width and rule in every picture: that of the rule, and one of its own for a proxy."""
        proxies = [f"proxy of {rule}" for width, rule in self.keys if width == self.narrow]
        rules = dict.fromkeys(rule for width, rule in self.keys if width != self.narrow)
        name = f"proxy of {key[1]}" if key[0] == self.narrow else key[1]
        return LIGHT[[*proxies, *rules].index(name) % len(LIGHT)]

    def dashes(self, key: Key) -> str:
        """Return how the lines of a width are drawn: the widest dashed, if there are several wide ones."""
        wide = sorted({width for width, _ in self.keys} - {self.narrow})
        return "--" if len(wide) > 1 and key[0] == wide[-1] else "-"

    def median(self, key: Key, column: str) -> dict[int, float]:
        """Return a quantity over the iterations, the median over the matrices."""
        by_iteration: dict[int, list[float]] = {}
        for row in self.rows:
            if (int(row["hidden_size"]), row["rule"]) == key and row[column]:
                by_iteration.setdefault(int(row["iteration"]), []).append(float(row[column]))
        return {iteration: statistics.median(values) for iteration, values in sorted(by_iteration.items())}

    def layers_half_way(self, key: Key, column: str) -> dict[str, float]:
        """Return a quantity of every matrix at the measured iteration nearest to half of the run."""
        own = [row for row in self.rows if (int(row["hidden_size"]), row["rule"]) == key and row[column]]
        half = max(int(row["iteration"]) for row in own) / 2
        at = min({int(row["iteration"]) for row in own}, key=lambda one: abs(one - half))
        return {row["layer"]: float(row[column]) for row in own if int(row["iteration"]) == at}


def mean_log2_rrcs(path: Path) -> dict[Key, dict[float, float]]:
    """Return the mean over run and matrices of log2 of the RRC, by width and rule, over log2 of the base LR; one seed.

    The last measured iteration is left out: the LR is 0 there.
    """
    rows = rows_of(path)
    last = max(int(row["iteration"]) for row in rows)
    values: dict[Key, dict[float, list[float]]] = {}
    for row in rows:
        rrc = row["relative_representation_change"]
        if rrc and int(row["iteration"]) < last:
            curve = values.setdefault((int(row["hidden_size"]), row["rule"]), {})
            curve.setdefault(math.log2(float(row["lr"])), []).append(math.log2(float(rrc)))
    return {key: {x: statistics.fmean(logs) for x, logs in sorted(curve.items())} for key, curve in values.items()}
