"""The metrics of one process against plain float64: a layer's own forward function with W, with dW, with ones."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_patch.errors import ConfigError
from megatron_patch.metrics.sample import sample_positions
from megatron_patch.plain import AlignmentMeter, width_groups
from tests.support.plain_models import mixed, proxy

LR, DECAY = 0.01, 0.1


def forward(module: nn.Module, inputs: Tensor, weight: Tensor) -> Tensor:
    """What a layer computes with a weight and no bias, in float64, channels last: [tokens, K]."""
    if isinstance(module, nn.Linear):
        return functional.linear(inputs, weight).flatten(0, -2)
    if type(module).__name__ == "Conv1D":
        return (inputs @ weight).flatten(0, -2)
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    output: Tensor = module._conv_forward(inputs, weight, None)
    return output.movedim(1, -1).flatten(0, -2)


def squared_inputs(module: nn.Module, inputs: Tensor) -> Tensor:
    """What the squares of each token's inputs add up to, [tokens]: a convolution with ones, over all channels."""
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return inputs.square().sum(-1).flatten()
    ones = torch.ones_like(module.weight[:1], dtype=torch.float64)
    channels = module.in_channels
    whole = type(module)(
        channels,
        1,
        module.kernel_size,
        module.stride,  # type: ignore[arg-type]
        module.padding,  # type: ignore[arg-type]
        module.dilation,  # type: ignore[arg-type]
        padding_mode=module.padding_mode,
    )
    ones = ones.expand(1, module.weight.shape[1], *module.kernel_size).repeat(
        1, module.groups, *[1] * len(module.kernel_size)
    )
    return whole._conv_forward(inputs.square(), ones, None).flatten()


def top_singular_value(module: nn.Module, weight: Tensor) -> float:
    groups = getattr(module, "groups", 1)
    return max(float(torch.linalg.matrix_norm(w.flatten(1), 2)) for w in weight.chunk(groups))


def measured_and_expected(
    model: nn.Module, batch: Tensor, tokens: int, groups: Any
) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:
    """The lines of the second of two steps, and the same from float64."""
    optimizer = torch.optim.AdamW(groups)
    meter = AlignmentMeter(model, optimizer, tokens=tokens)
    modules = {name: model.get_submodule(name) for name in meter.layers}
    inputs: dict[str, Tensor] = {}
    for name, module in modules.items():
        module.register_forward_hook(
            lambda m, args, out, name=name: inputs.__setitem__(name, args[0].detach().double())
        )
    for step in (1, 2):
        old = {name: module.weight.detach().double() for name, module in modules.items()}
        with meter.measure(step) as measured:
            model(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    live = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    expected = {}
    for name, module in modules.items():
        group = live[id(module.weight)]
        w = old[name]
        dw = module.weight.detach().double() - (1 - group["lr"] * group["weight_decay"]) * w
        y, dy, x = (
            forward(module, inputs[name], w),
            forward(module, inputs[name], dw),
            squared_inputs(module, inputs[name]),
        )
        at = sample_positions(len(y), tokens, seed=2)
        y_norm, dy_norm, x_norm = (math.sqrt(float(t[at].square().sum())) for t in (y, dy, x.sqrt()))
        w_norm, dw_norm = float(w.norm()), float(dw.norm())
        expected[name] = {
            "lr": group["lr"],
            "weight_decay": group["weight_decay"],
            "tokens": len(at),
            "fan_in": w.numel() // y.shape[1],
            "fan_out": y.shape[1],
            "weight_norm": w_norm,
            "update_norm": dw_norm,
            "relative_update": dw_norm / w_norm,
            "weight_alignment": y_norm / (w_norm * x_norm),
            "update_alignment": dy_norm / (dw_norm * x_norm),
            "alignment_ratio": dy_norm / dw_norm / (y_norm / w_norm),
            "relative_representation_change": dy_norm / y_norm,
            "top_singular_value": top_singular_value(module, w),
        }
    return measured.lines, expected


def compare(lines: list[dict[str, Any]], expected: dict[str, dict[str, float]]) -> None:
    assert [line["layer"] for line in lines] == list(expected)
    for line in lines:
        for key, value in expected[line["layer"]].items():
            tolerance = 1e-3 if key == "top_singular_value" else 1e-5
            assert line[key] == pytest.approx(value, rel=tolerance), (line["layer"], key)


CONVOLUTIONS = {
    "1d": (lambda: nn.Conv1d(6, 8, 3), (3, 6, 11)),
    "1d stride, circular": (lambda: nn.Conv1d(6, 8, 4, stride=2, padding=3, padding_mode="circular"), (3, 6, 11)),
    "1d same, depthwise": (lambda: nn.Conv1d(6, 12, 4, padding="same", groups=6, bias=False), (3, 6, 11)),
    "2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 3)), (2, 4, 9, 10)),
    "2d groups, reflect": (lambda: nn.Conv2d(4, 6, 3, padding=2, groups=2, padding_mode="reflect"), (2, 4, 7, 8)),
    "2d same, dilated": (lambda: nn.Conv2d(4, 6, (2, 3), padding="same", dilation=2), (2, 4, 7, 8)),
    "3d": (lambda: nn.Conv3d(2, 6, (2, 3, 1), stride=2, padding=1, groups=2), (2, 2, 5, 6, 4)),
}


@pytest.mark.parametrize("tokens", [7, 10**6])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_of_every_kind(kind: str, tokens: int) -> None:
    torch.manual_seed(1)
    build, shape = CONVOLUTIONS[kind]
    model = nn.Sequential(build())
    groups = [{"params": model.parameters(), "lr": LR, "weight_decay": DECAY}]
    compare(*measured_and_expected(model, torch.randn(shape), tokens, groups))


@pytest.mark.parametrize("tokens", [5, 10**6])
def test_a_whole_model(tokens: int) -> None:
    model = mixed()
    groups = width_groups(model, rule="independent", base=proxy(), lr=LR, weight_decay=DECAY)
    batch = torch.randint(0, 13, (4, 9), generator=torch.Generator().manual_seed(2))
    lines, expected = measured_and_expected(model, batch, tokens, groups)
    compare(lines, expected)
    assert {line["layer"]: line["m"] for line in lines} == {
        "fc1": 4, "fc2": 3, "mixing": 4, "depthwise": 2, "back": 2, "head": 4
    }  # fmt: skip
    for line in lines:  # [K] eq. 4
        assert line["relative_representation_change"] == pytest.approx(
            line["alignment_ratio"] * line["relative_update"], rel=1e-9
        )


def test_transposed_weights_of_transformers() -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(1)
    model = nn.Sequential(Conv1D(7, 5), nn.GELU(), Conv1D(3, 7))
    groups = [{"params": model.parameters(), "lr": LR, "weight_decay": DECAY}]
    lines, expected = measured_and_expected(model, torch.randn(4, 6, 5), 11, groups)
    for name, module in (("0", model[0]), ("2", model[2])):
        expected[name]["fan_in"], expected[name]["fan_out"] = module.weight.shape
    compare(lines, expected)


def small() -> tuple[nn.Module, torch.optim.AdamW]:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    return model, torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY)


def test_a_skipped_step_has_no_update_and_more_than_one_is_refused() -> None:
    model, optimizer = small()
    meter = AlignmentMeter(model, optimizer)
    with meter.measure(1) as measured:
        model(torch.randn(3, 6)).sum().backward()  # as GradScaler does at an overflow
    assert [line["update_norm"] for line in measured.lines] == [None, None]
    assert all(line["weight_alignment"] > 0 for line in measured.lines)
    meter.begin(2)
    model(torch.randn(3, 6)).sum().backward()
    optimizer.step()
    optimizer.step()
    with pytest.raises(ConfigError, match="iteration 2: expected one optimizer step, not 2"):
        meter.end()


def test_the_lr_is_that_of_the_step_wherever_the_scheduler_is_called() -> None:
    lines = []
    for early in (False, True):
        torch.manual_seed(3)
        model, optimizer = small()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t, late=early: 1.0 + (t > 0) * late)
        meter = AlignmentMeter(model, optimizer)
        with meter.measure(1) as measured:
            model(torch.ones(3, 6)).sum().backward()
            optimizer._opt_called = True  # scheduler.step() comes first on purpose
            if early:
                scheduler.step()
            optimizer.step()
            if not early:
                scheduler.step()
        lines.append(measured.lines[0])
    assert (lines[0]["lr"], lines[1]["lr"]) == (LR, 2 * LR)
    assert lines[1]["update_norm"] == pytest.approx(2 * lines[0]["update_norm"], rel=1e-5)


def test_nothing_is_left_behind() -> None:
    model, optimizer = small()
    meter = AlignmentMeter(model, optimizer)
    meter.begin(1)
    assert meter.held_bytes == 2 * 4 * 36
    assert all(module._forward_hooks for module in model)
    assert optimizer._optimizer_step_post_hooks
    model(torch.randn(3, 6)).sum().backward()
    optimizer.step()
    meter.end()
    with pytest.raises(ZeroDivisionError), meter.measure(2):
        raise ZeroDivisionError
    assert not any(module._forward_hooks for module in model)
    assert not optimizer._optimizer_step_post_hooks
    assert meter.held_bytes == 0
    with pytest.raises(RuntimeError, match=re.escape("end() without begin()")):
        meter.end()


def test_measuring_changes_no_bit_of_the_training() -> None:
    ends = []
    for measured in (False, True):
        model, state = mixed(), torch.get_rng_state()
        optimizer = torch.optim.AdamW(width_groups(model, rule="sqrt", base=proxy(), lr=LR, weight_decay=DECAY))
        meter = AlignmentMeter(model, optimizer)
        batch = torch.randint(0, 13, (4, 9), generator=torch.Generator().manual_seed(2))
        for step in range(3):
            if measured:
                meter.begin(step)
            functional.dropout(model(batch), 0.1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if measured:
                meter.end()
        ends.append([p.detach().clone() for p in model.parameters()])
        torch.set_rng_state(state)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_model_compiled_before_says_why_it_cannot_be_measured() -> None:
    model, optimizer = small()
    compiled = torch.compile(model, backend="eager")
    compiled(torch.randn(3, 6))
    meter = AlignmentMeter(compiled, optimizer)
    meter.begin(1)
    compiled(torch.randn(3, 6))
    with pytest.raises(
        ConfigError, match=r"0 was not called since .* torch.compile skips hooks that are attached after"
    ):
        meter.end()


def test_only_the_first_micro_batch_is_looked_at() -> None:
    model, optimizer = small()
    meter = AlignmentMeter(model, optimizer)
    with meter.measure(1) as measured:
        for rows in (3, 5):
            model(torch.randn(rows, 6)).sum().backward()
        optimizer.step()
    assert [line["tokens"] for line in measured.lines] == [3, 3]


def test_what_is_not_measured_is_named() -> None:
    model = nn.ModuleDict({"words": nn.Embedding(4, 8), "mix": nn.MultiheadAttention(8, 2), "out": nn.Linear(8, 4)})
    meter = AlignmentMeter(model, torch.optim.AdamW(model.parameters()), layers="out|mix")
    assert meter.layers == ("out",)
    assert meter.unmeasured == ("words.weight", "mix.in_proj_weight", "mix.out_proj.weight")


def test_wrong_input_is_one_clear_line() -> None:
    model, optimizer = small()
    for arguments, complaint in (
        ((model, optimizer, {"layers": "nothing"}), "layers 'nothing': expected a pattern that matches"),
        ((model, optimizer, {"tokens": 0}), "tokens 0: expected a positive integer"),
        ((model, None, {}), "optimizer not given: expected the optimizer"),
        ((model, object(), {}), "optimizer object: expected a torch optimizer"),
        ((model, torch.optim.AdamW(model[0].parameters()), {}), "optimizer without 1.weight: expected the optimizer"),
        (
            (model, torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1), {}),
            "optimizer SGD: expected decoupled weight decay",
        ),
        ((small()[0].bfloat16(), optimizer, {}), "model 0 in torch.bfloat16: expected fp32 weights"),
    ):
        with pytest.raises(ConfigError) as caught:
            AlignmentMeter(arguments[0], arguments[1], **arguments[2])
        assert str(caught.value).startswith(complaint)
    AlignmentMeter(model, torch.optim.SGD(model.parameters(), 0.1))
    model.append(nn.Linear(6, 6))
    meter = AlignmentMeter(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(ConfigError, match="layers that the forward pass calls: 2 was not called"), meter.measure(1):
        model[1](model[0](torch.randn(2, 6)))
