"""The whole thing again, plainly: a GPT with full matrices in float64 on one process, its AdamW, and every metric.

Nothing here is shared with the package but the choice of sampled tokens. Weights are a function of their name, so that
a sharded Megatron model (`scatter_weights`) and this one start from the same numbers.
"""

import math
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megatron_patch.metrics.sample import sample_positions
from tests.support.training import _sequence

# Adam's first updates are nearly g / (|g| + eps). With the usual eps of 1e-8 they are the sign of the gradient, and
# where that is rounding noise fp32 and fp64 disagree by 100%: not what these tests are about.
EPS = 1e-4


@dataclass(frozen=True)
class Model:
    """What the reference can build; the flags that make Megatron build the same are in `flags`."""

    hidden: int = 32
    layers: int = 2
    heads: int = 4
    groups: int = 2
    ffn: int = 48
    length: int = 32
    vocabulary: int = 64
    gated: bool = True
    norm: str = "RMSNorm"
    bias: bool = False
    tied: bool = False
    experts: int = 0
    topk: int = 2
    shared: int = 0
    latent: tuple[int, int, int, int, int] | None = None
    """MLA: q rank, kv rank, head size without and with position, value head size."""

    def flags(self) -> list[str]:
        """Return Megatron's flags."""
        text = (
            f"--num-layers {self.layers} --hidden-size {self.hidden} --num-attention-heads {self.heads} "
            f"--ffn-hidden-size {self.ffn} --seq-length {self.length} --max-position-embeddings {self.length} "
            f"--vocab-size {self.vocabulary - 1} --make-vocab-size-divisible-by 16 --normalization {self.norm} "
            "--micro-batch-size 2 --global-batch-size 8 --lr 1e-2 --min-lr 0 --lr-decay-style constant "
            f"--lr-warmup-iters 0 --weight-decay 0.1 --clip-grad 1.0 --adam-eps {EPS}"
        )
        if self.latent:
            q, kv, nope, pe, v = self.latent
            text += f" --multi-latent-attention --q-lora-rank {q} --kv-lora-rank {kv} --qk-head-dim {nope}"
            text += f" --qk-pos-emb-head-dim {pe} --v-head-dim {v} --rope-type rope --position-embedding-type rope"
            text += " --qk-layernorm"
        elif self.groups != self.heads:
            text += f" --group-query-attention --num-query-groups {self.groups}"
        text += " --swiglu" if self.gated else ""
        text += "" if self.bias else " --disable-bias-linear"
        text += "" if self.tied else " --untie-embeddings-and-output-weights"
        if self.experts:
            text += f" --num-experts {self.experts} --moe-router-topk {self.topk} --moe-ffn-hidden-size {self.ffn}"
            text += " --moe-router-load-balancing-type none --moe-aux-loss-coeff 0"
            text += f" --moe-shared-expert-intermediate-size {self.shared}" if self.shared else ""
        return text.split()


def initial_value(name: str, shape: Sequence[int]) -> Tensor:
    """Return the starting value of a parameter of the whole model, fp32; gated layers are [all gates; all ups]."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    value = torch.randn(*shape, generator=generator)
    if len(shape) == 1:
        return 0.1 * value + (0.0 if name.endswith("bias") else 1.0)
    return value * (1.5 / math.sqrt(shape[1]) if "embedding" not in name else 0.3)


def local_spec_name(name: str) -> str:
    """Return what the local layer spec calls a parameter that Transformer Engine keeps elsewhere.

    >>> local_spec_name("decoder.layers.1.self_attention.linear_qkv.layer_norm_weight")
    'decoder.layers.1.input_layernorm.weight'
    >>> local_spec_name("decoder.layers.1.mlp.experts.linear_fc1.weight5")
    'decoder.layers.1.mlp.experts.local_experts.5.linear_fc1.weight'
    """
    for fused, norm in (
        (r"self_attention\.linear_qkv", "input_layernorm"),
        (r"self_attention\.linear_q_up_proj", "self_attention.q_layernorm"),
        (r"self_attention\.linear_kv_up_proj", "self_attention.kv_layernorm"),
        (r"mlp\.linear_fc1", "pre_mlp_layernorm"),
    ):
        name = re.sub(fused + r"\.layer_norm_(weight|bias)$", norm + r".\1", name)
    return re.sub(r"experts\.(linear_fc\d)\.weight(\d+)", r"experts.local_experts.\2.\1.weight", name)


def scatter_weights(parameters: Sequence[Any], optimizer: Any, groups: Any, gated: bool) -> None:
    """Overwrite the weights of a Megatron model by this rank's shards of `initial_value`.

    Args:
        parameters: `NamedParameter`s of this rank.
        optimizer: gets its fp32 copies from the new weights.
        groups: Megatron's `parallel_state`.
        gated: whether fc1 is [gates; ups], each of which is cut over the ranks.
    """
    for p in parameters:
        whole = initial_value(local_spec_name(p.spec.name), p.spec.shape)
        expert = ".experts." in p.spec.name
        size = (
            groups.get_expert_tensor_parallel_world_size() if expert else groups.get_tensor_model_parallel_world_size()
        )
        rank = groups.get_expert_tensor_parallel_rank() if expert else groups.get_tensor_model_parallel_rank()
        if getattr(p.parameter, "tensor_model_parallel", False) and size > 1:
            dim = p.parameter.partition_dim
            halves = whole.chunk(2, dim) if gated and ".linear_fc1.weight" in p.spec.name else (whole,)
            whole = torch.cat([half.chunk(size, dim)[rank] for half in halves], dim)
        with torch.no_grad():
            p.parameter.copy_(whole)
    optimizer.reload_model_params()


@dataclass
class Recorder:
    """Inputs of every linear layer in one forward pass."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    """[S, G, C] over all G sequences of the global batch."""
    routed: dict[str, Tensor] = field(default_factory=dict)
    """Which tokens went to an expert, [S, G]; absent for dense layers."""
    outputs: dict[str, Tensor] = field(default_factory=dict)
    """What each attention and MLP block adds to the residual stream, [S, G, hidden]."""


class Reference:
    """The model, its optimizer and its metrics."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.weights: dict[str, Tensor] = {}
        self.linears: list[str] = []
        self.recorder = Recorder()
        self.forward(torch.zeros(1, model.length, dtype=torch.int64))  # makes the weights

    # --- forward --------------------------------------------------------------------------------------------------

    def weight(self, name: str, *shape: int) -> Tensor:
        if name not in self.weights:
            self.weights[name] = initial_value(name, shape).double().requires_grad_()
        return self.weights[name]

    def linear(
        self, name: str, x: Tensor, fan_out: int, routed: Tensor | None = None, bias: bool | None = None
    ) -> Tensor:
        weight = self.weight(f"{name}.weight", fan_out, x.shape[-1])
        if name not in self.linears:
            self.linears.append(name)
        self.recorder.inputs[name] = x.detach()
        if routed is not None:
            self.recorder.routed[name] = routed
        y = x @ weight.T
        if self.model.bias if bias is None else bias:
            y = y + self.weight(f"{name}.bias", fan_out)
        return y

    def norm(self, name: str, x: Tensor) -> Tensor:
        gain = self.weight(f"{name}.weight", x.shape[-1])
        if self.model.norm == "RMSNorm":
            return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain
        centred = x - x.mean(-1, keepdim=True)
        bias = self.weight(f"{name}.bias", x.shape[-1])
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain + bias

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [S, G, V] of token ids [G, S]."""
        m = self.model
        self.recorder = Recorder()
        table = self.weight("embedding.word_embeddings.weight", m.vocabulary, m.hidden)
        x = table[tokens.T]
        if not m.latent:
            positions = self.weight("embedding.position_embeddings.weight", m.length, m.hidden)
            x = x + positions[:, None, :]
        for i in range(m.layers):
            layer = f"decoder.layers.{i}"
            for block, norm in (("self_attention", "input_layernorm"), ("mlp", "pre_mlp_layernorm")):
                y = self.block(f"{layer}.{block}", self.norm(f"{layer}.{norm}", x))
                self.recorder.outputs[f"{layer}.{block}"] = y.detach()
                x = x + y
        x = self.norm("decoder.final_layernorm", x)
        if m.tied:
            self.recorder.inputs["output_layer"] = x.detach()
            return x @ table.T
        return self.linear("output_layer", x, m.vocabulary, bias=False)

    def block(self, name: str, x: Tensor) -> Tensor:
        if name.endswith("self_attention"):
            return self.latent_attention(name, x) if self.model.latent else self.attention(name, x)
        return self.mixture(name, x) if self.model.experts else self.mlp(name, x, self.model.ffn)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return causal attention of [S, G, heads, size] tensors, heads side by side: [S, G, heads * size]."""
        scores = torch.einsum("sghd,tghd->ghst", q, k) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
        return torch.einsum("ghst,tghd->sghd", scores.softmax(-1), v).flatten(2)

    def attention(self, name: str, x: Tensor) -> Tensor:
        m = self.model
        head = m.hidden // m.heads
        per_group = m.heads // m.groups
        qkv = self.linear(f"{name}.linear_qkv", x, (m.heads + 2 * m.groups) * head)
        qkv = qkv.view(*x.shape[:2], m.groups, per_group + 2, head)
        q = qkv[:, :, :, :per_group].flatten(2, 3)
        k = qkv[:, :, :, per_group].repeat_interleave(per_group, 2)
        v = qkv[:, :, :, per_group + 1].repeat_interleave(per_group, 2)
        return self.linear(f"{name}.linear_proj", self.attend(q, k, v), m.hidden)

    def latent_attention(self, name: str, x: Tensor) -> Tensor:
        m = self.model
        assert m.latent
        q_rank, kv_rank, nope, pe, v_size = m.latent
        q = self.norm(f"{name}.q_layernorm", self.linear(f"{name}.linear_q_down_proj", x, q_rank, bias=False))
        q = self.linear(f"{name}.linear_q_up_proj", q, m.heads * (nope + pe), bias=False)
        q = q.view(*x.shape[:2], m.heads, nope + pe)
        kv, k_pe = self.linear(f"{name}.linear_kv_down_proj", x, kv_rank + pe, bias=False).split([kv_rank, pe], -1)
        kv = self.linear(
            f"{name}.linear_kv_up_proj", self.norm(f"{name}.kv_layernorm", kv), m.heads * (nope + v_size), bias=False
        )
        k, v = kv.view(*x.shape[:2], m.heads, nope + v_size).split([nope, v_size], -1)
        q = torch.cat([q[..., :nope], self.rotate(q[..., nope:])], -1)
        k = torch.cat([k, self.rotate(k_pe[:, :, None, :]).expand(-1, -1, m.heads, -1)], -1)
        return self.linear(f"{name}.linear_proj", self.attend(q, k, v), m.hidden)

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary embedding of [S, G, heads, size]; pairs are interleaved, as MLA's checkpoints have them."""
        size = x.shape[-1]
        frequency = 10000.0 ** (-torch.arange(0, size, 2).double() / size)
        angle = torch.arange(x.shape[0]).double()[:, None, None, None] * frequency
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def mlp(
        self, name: str, x: Tensor, ffn: int, routed: Tensor | None = None, probability: Tensor | None = None
    ) -> Tensor:
        h = self.linear(f"{name}.linear_fc1", x, ffn * (2 if self.model.gated else 1), routed)
        if self.model.gated:
            gate, up = h.chunk(2, -1)
            h = functional.silu(gate) * up
        else:
            h = functional.gelu(h)
        if probability is not None:
            h = h * probability[..., None]
        return self.linear(f"{name}.linear_fc2", h, self.model.hidden, routed)

    def mixture(self, name: str, x: Tensor) -> Tensor:
        m = self.model
        logits = self.linear(f"{name}.router", x, m.experts, bias=False)
        top, chosen = logits.topk(m.topk, -1)
        probabilities = torch.zeros_like(logits).scatter(-1, chosen, top.softmax(-1))
        routed = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, chosen, True)
        y = torch.zeros_like(x)
        for e in range(m.experts):
            out = self.mlp(f"{name}.experts.local_experts.{e}", x, m.ffn, routed[..., e], probabilities[..., e])
            y = y + out * routed[..., e, None]
        if m.shared:
            y = y + self.mlp(f"{name}.shared_experts", x, m.shared)
        return y

    # --- training and metrics -------------------------------------------------------------------------------------

    def train(
        self, steps: int, data_ranks: int, sampled: int, context_ranks: int = 1
    ) -> Iterator[dict[str, dict[str, float]]]:
        """Yield the metrics of each step by line name.

        Args:
            steps: how many.
            data_ranks: data-parallel size, which decides whose first microbatches are looked at.
            sampled: tokens per data-parallel and context-parallel rank.
            context_ranks: context-parallel size n; rank r holds chunks r and 2n - 1 - r of each sequence.
        """
        batch, micro, lr, decay = 8, 2, 1e-2, 0.1
        moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in self.weights.items()}
        for step in range(steps):
            samples = [
                _sequence(i, self.model.length, self.model.vocabulary - 1)
                for i in range(step * batch, (step + 1) * batch)
            ]
            tokens = torch.stack([s["tokens"] for s in samples])
            labels = torch.stack([s["labels"] for s in samples])
            logits = self.forward(tokens)
            loss = functional.cross_entropy(logits.flatten(0, 1), labels.T.flatten())
            gradients = dict(zip(self.weights, torch.autograd.grad(loss, list(self.weights.values())), strict=True))
            norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
            clip = min(1.0, 1.0 / (norm + 1e-6))
            new = {}
            for name, w in self.weights.items():
                g = gradients[name] * clip
                first, second = moments[name]
                first.mul_(0.9).add_(0.1 * g)
                second.mul_(0.999).add_(0.001 * g * g)
                update = (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.999 ** (step + 1))).sqrt() + EPS)
                wd = decay if w.dim() > 1 else 0.0
                new[name] = ((1 - lr * wd) * w - lr * update).detach()
            yield dict(self.metrics(new, step + 1, data_ranks, context_ranks, micro, sampled, lr, decay))
            self.weights = {name: w.requires_grad_() for name, w in new.items()}

    def metrics(
        self,
        new: dict[str, Tensor],
        iteration: int,
        data_ranks: int,
        context_ranks: int,
        micro: int,
        sampled: int,
        lr: float,
        decay: float,
    ) -> Iterator[tuple[str, dict[str, float]]]:
        length = self.model.length
        positions = sample_positions(length // context_ranks * micro, sampled, iteration)
        chunks = torch.arange(length).chunk(2 * context_ranks)
        held = [torch.cat([chunks[r], chunks[2 * context_ranks - 1 - r]]) for r in range(context_ranks)]
        for name, inputs in self.recorder.inputs.items():
            key = "embedding.word_embeddings.weight" if name not in self.linears else f"{name}.weight"
            w = self.weights[key].detach()
            dw = new[key] - (1 - lr * decay) * w
            chosen = []
            for rank in range(data_ranks):
                for places in held:
                    mine = inputs[places, rank * micro : (rank + 1) * micro]
                    x = mine.reshape(-1, inputs.shape[-1])[positions]
                    if name in self.recorder.routed:
                        routed = self.recorder.routed[name][places, rank * micro : (rank + 1) * micro]
                        x = x[routed.reshape(-1)[positions]]
                    chosen.append(x)
            x = torch.cat(chosen).T  # [C, B]
            for part, rows in self.parts(name, w.shape[0]).items():
                yield name + part, one_layer(w[rows], dw[rows], x)

    def parts(self, name: str, rows: int) -> dict[str, Tensor]:
        m = self.model
        numbers = torch.arange(rows)
        if name.endswith("linear_qkv"):
            head = m.hidden // m.heads
            place = numbers % ((m.heads // m.groups + 2) * head) // head
            per_group = m.heads // m.groups
            return {"/q": place < per_group, "/k": place == per_group, "/v": place == per_group + 1}
        if name.endswith("linear_fc1") and m.gated:
            return {"/gate": numbers < rows // 2, "/up": numbers >= rows // 2}
        return {"": numbers >= 0}


def one_layer(w: Tensor, dw: Tensor, x: Tensor) -> dict[str, float]:
    """Return the metrics of one matrix from their definitions (arXiv 2510.19093, eqs. 2 to 4)."""

    def norm(matrix: Tensor) -> float:
        return float(matrix.square().sum().sqrt())

    result = {
        "tokens": float(x.shape[1]),
        "weight_norm": norm(w),
        "update_norm": norm(dw),
        "relative_update": norm(dw) / norm(w),
        "top_singular_value": float(torch.linalg.matrix_norm(w, 2)),
    }
    if x.shape[1]:
        result["weight_alignment"] = norm(w @ x) / (norm(w) * norm(x))
        result["update_alignment"] = norm(dw @ x) / (norm(dw) * norm(x))
        result["alignment_ratio"] = result["update_alignment"] / result["weight_alignment"]
        result["relative_representation_change"] = norm(dw @ x) / norm(w @ x)
    return result
