"""Which class each parameter of a torch model belongs to, and which of its dimensions are its fan-in."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from megatron_patch.errors import ConfigError
from megatron_patch.theory.width import ROLES, Role

type Class = Role | tuple[Role, int] | tuple[Role, Sequence[int]]
"""What a user says of a parameter: its class, with the dimensions that are the fan-in where it has one."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_OUTPUT_NAMES = ("lm_head", "output_layer", "embed_out", "unembed", "head", "classifier", "score")
"""What a model's last layer is called: any other name has to be given."""
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_KNOWN = "Linear, Embedding, Conv1d to Conv3d, transformers' Conv1D, MultiheadAttention, norms, biases, any vector"


@dataclass(frozen=True)
class Classified:
    """One trainable parameter."""

    name: str
    """As `named_parameters` has it, without the names of wrappers."""
    parameter: nn.Parameter
    shape: tuple[int, ...]
    """Of the whole parameter, also where FSDP2 or ZeRO-3 have cut it up."""
    role: Role
    fan_in: int
    """1 for vectors; the width for embeddings."""
    tied: bool = False
    """An embedding that is also the weight of the output layer."""


def plain_name(name: str) -> str:
    """Return a parameter's or module's name without what DDP, DeepSpeed, torch.compile and checkpointing add.

    >>> plain_name("module._orig_mod.layers.0._checkpoint_wrapped_module.fc.weight")
    'layers.0.fc.weight'
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while parts and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def whole_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of a parameter before ZeRO-3 took it apart; FSDP2's DTensors know it themselves."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def is_transposed(module: nn.Module) -> bool:
    """Return whether a module is transformers' Conv1D, a linear layer with a weight of [fan-in, fan-out]."""
    return any(f"{c.__module__}.{c.__qualname__}" == "transformers.pytorch_utils.Conv1D" for c in type(module).__mro__)


def classify(
    model: nn.Module,
    output: str | None = "auto",
    classes: Mapping[str, Class] | None = None,
    all_used: bool = True,
) -> list[Classified]:
    """Return every trainable parameter with its class and fan-in, in the order of `named_parameters`.

    Args:
        model: wrapped or not, on any device.
        output: name of the module that is the output layer; "auto" recognises it; None: there is none.
        classes: what a user says, by parameter name, or by pattern, of which the first that matches counts.
        all_used: whether every entry of `classes` has to be of use.

    Raises:
        ConfigError: a parameter in a module that is not known; no output layer, or several; a name that fits nothing.
    """
    given = _Given(classes or {})
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules(remove_duplicate=True):
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.requires_grad:
                owners.setdefault(id(parameter), []).append((plain_name(prefix), module, key))
                parameters[id(parameter)] = parameter
    last = _output_layer(model, output, owners)
    found: list[Classified] = []
    unknown: list[str] = []
    for identity, places in owners.items():
        parameter = parameters[identity]
        shape = whole_shape(parameter)
        name = _joined(places[0][0], places[0][2])
        role_and_dims = given.of([_joined(prefix, key) for prefix, _, key in places], shape)
        if role_and_dims is None:
            roles = [r for prefix, module, key in places if (r := _role(prefix, module, key, shape, last)) is not None]
            # A parameter that two modules share: the embedding's class comes first, as in Megatron.
            order = ("embedding", "output", "matrix", "vector")
            role_and_dims = min(roles, key=lambda r: order.index(r[0]), default=None)
        if role_and_dims is None:
            unknown.append(f"{name} of shape {shape} in a {type(places[0][1]).__name__}")
            continue
        role, dims = role_and_dims
        fan_in = math.prod(shape[d] for d in dims) if role != "vector" else 1
        tied = role == "embedding" and any(prefix == last for prefix, _, _ in places)
        found.append(Classified(name, parameter, shape, role, fan_in, tied))
    if all_used:
        given.require_used()
    names = [p.name for p in found]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(
            "model",
            f"with two parameters called {twice}",
            "names that differ when those of wrappers (module, _orig_mod, ...) are taken away",
            "rename the submodule that is called like a wrapper",
        )
    if unknown:
        name = re.sub(r"(?<=\.)\d+(?=\.)", "*", unknown[0].split()[0])
        raise ConfigError(
            "model",
            f"{unknown[0]}{f' (and {len(unknown) - 1} more)' if len(unknown) > 1 else ''}",
            f"a parameter whose class is known ({_KNOWN})",
            f'say what it is: classes={{"{name}": ("matrix", dimension)}} with the dimension that is its fan-in, '
            'or "vector", or ("embedding", dimension)',
        )
    return found


def _joined(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key


def _role(
    prefix: str, module: nn.Module, key: str, shape: tuple[int, ...], last: str | None
) -> tuple[Role, tuple[int, ...]] | None:
    """Return what a parameter is in one of the modules that own it; None where that is not known."""
    weighty = isinstance(module, (nn.Linear, nn.Embedding, nn.EmbeddingBag, *CONVOLUTIONS)) or is_transposed(module)
    if weighty and key == "weight" and len(shape) < 2:
        raise ConfigError(
            "model",
            f"{_joined(prefix, key)} of shape {shape}",
            "weights with their own shapes; FullyShardedDataParallel flattens them",
            "use torch.distributed.fsdp.fully_shard, or call width_groups before wrapping",
        )
    if len(shape) <= 1 or key == "bias" or type(module).__name__.endswith("Norm"):
        return "vector", ()
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return "vector", ()
    role: Role = "output" if prefix == last else "matrix"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and key == "weight":
        return "embedding", (1,)
    if isinstance(module, nn.Linear) and key == "weight":
        return role, (1,)
    if isinstance(module, CONVOLUTIONS) and key == "weight":
        return role, tuple(range(1, len(shape)))  # [K, C / groups, k, k]
    if is_transposed(module) and key == "weight":
        return role, (0,)
    if isinstance(module, nn.MultiheadAttention):
        return ("vector", ()) if key in ("bias_k", "bias_v") else ("matrix", (1,))
    return None


def _output_layer(
    model: nn.Module, output: str | None, owners: Mapping[int, list[tuple[str, nn.Module, str]]]
) -> str | None:
    """Return the name of the output layer, None where a user says that there is none."""
    if output is None:
        return None
    names = {plain_name(name): module for name, module in model.named_modules()}
    if output != "auto":
        if output not in names:
            raise ConfigError("output", output, "the name of a module of the model", "see model.named_modules()")
        return output
    candidates = list(_given_by_model(model, names))
    tied = [
        prefix
        for places in owners.values()
        if any(isinstance(m, nn.Embedding) for _, m, _ in places)
        for prefix, module, _ in places
        if isinstance(module, nn.Linear)
    ]
    candidates = candidates or tied or [n for n in names if n.rpartition(".")[2] in _OUTPUT_NAMES and _linear(names[n])]
    if len(set(candidates)) == 1:
        return candidates[0]
    raise ConfigError(
        "output",
        f"'auto', which finds {', '.join(sorted(set(candidates))) or 'none'}",
        f"one output layer: what get_output_embeddings() returns, a tied one, or one named {', '.join(_OUTPUT_NAMES)}",
        'give its name, output="...", or output=None for a model without one',
    )


def _given_by_model(model: nn.Module, names: Mapping[str, nn.Module]) -> Iterator[str]:
    """Yield the output layer that a Hugging Face model names itself."""
    for module in model.modules():
        ask = getattr(module, "get_output_embeddings", None)
        found: Any = ask() if callable(ask) else None
        if found is not None:
            yield from (name for name, other in names.items() if other is found)
            return


def _linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, *CONVOLUTIONS)) or is_transposed(module)


class _Given:
    """The classes that a user gives by name or pattern."""

    def __init__(self, classes: Mapping[str, Class]) -> None:
        self._classes = {pattern: _checked(pattern, value) for pattern, value in classes.items()}
        self._unused = set(classes)

    def of(self, names: Sequence[str], shape: tuple[int, ...]) -> tuple[Role, tuple[int, ...]] | None:
        """Return what was said of a parameter, by any of its names; an exact name before the first pattern."""
        exact = [name for name in names if name in self._classes]
        patterns = [p for p in self._classes if any(fnmatchcase(name, p) for name in names)]
        for key in (exact + patterns)[:1]:
            self._unused.discard(key)
            role, dims = self._classes[key]
            if role != "vector" and not dims:
                dims = (len(shape) - 1,) if len(shape) == 2 and role == "embedding" else ()
                if not dims:
                    raise ConfigError(
                        f"classes[{key!r}]", role, "the dimension that is the fan-in too", f'give ("{role}", dimension)'
                    )
            if any(not -len(shape) <= d < len(shape) for d in dims):
                raise ConfigError(
                    f"classes[{key!r}]", dims, f"dimensions of {names[0]}, whose shape is {shape}", "correct them"
                )
            return role, dims
        return None

    def require_used(self) -> None:
        """Raise ConfigError if something that was said is of no parameter."""
        for pattern in sorted(self._unused):
            raise ConfigError(
                f"classes[{pattern!r}]",
                self._classes[pattern][0],
                "a name or pattern of a trainable parameter, and that no earlier pattern matches",
                "see model.named_parameters()",
            )


def _checked(pattern: str, value: Class) -> tuple[Role, tuple[int, ...]]:
    role, dims = (value, ()) if isinstance(value, str) else value
    if role not in ROLES:
        raise ConfigError(f"classes[{pattern!r}]", role, f"one of {', '.join(ROLES)}", "choose one of them")
    return role, (dims,) if isinstance(dims, int) else tuple(dims)
