"""How large the runs are, and what their learning rates are by hand."""

from dataclasses import dataclass

BASE_LR, MIN_LR, WEIGHT_DECAY = 1e-2, 0.0, 0.1
ZEROED = 3
"""In the first steps gradients are set to zero before the optimizer sees them. In the last of these weights shrink, by
weight decay alone: it is the third, since the LR of the first is 0, and Transformer Engine's precision-aware optimizer
has no fp32 weights to look at before it."""


@dataclass(frozen=True)
class Size:
    """A proxy and how long it is trained."""

    layers: int
    hidden: int
    heads: int
    groups: int
    ffn: int
    base_hidden: int
    length: int
    batch: int
    """Sequences in the one micro batch of a step."""
    vocabulary: int
    steps: int
    warmup: int
    """Steps."""
    decay: int
    """Steps until the LR is 0."""
    interval: int
    """Steps from one measurement to the next."""

    @property
    def m(self) -> float:
        """Width multiplier."""
        return self.hidden / self.base_hidden

    @property
    def half(self) -> int:
        """The step at which a checkpoint is saved."""
        return self.steps // 2

    @property
    def exact(self) -> tuple[int, ...]:
        """The measured steps whose metrics are computed in float64 as well: the second and the last."""
        measured = [step for step in range(1, self.steps + 1) if step % self.interval == 0]
        return measured[1], measured[-1]

    def flags(self) -> list[str]:
        """Return the flags of model, rule and schedule; for `QUICKSTART` those of configs/quickstart_proxy.yaml.

        But for --init-scaling: weights are set by `watch.set_weights`.
        """
        return (
            f"--num-layers {self.layers} --hidden-size {self.hidden} --num-attention-heads {self.heads} "
            f"--group-query-attention --num-query-groups {self.groups} --kv-channels {self.hidden // self.heads} "
            f"--ffn-hidden-size {self.ffn} --swiglu --normalization RMSNorm --disable-bias-linear "
            "--untie-embeddings-and-output-weights --position-embedding-type rope --attention-dropout 0.0 "
            f"--hidden-dropout 0.0 --seq-length {self.length} --max-position-embeddings {self.length} "
            f"--tokenizer-type NullTokenizer --vocab-size {self.vocabulary - 1} --width-scaling sqrt "
            f"--base-hidden-size {self.base_hidden} --extra-warmup exp "
            f"--extra-warmup-iters {self.decay // 4} --micro-batch-size {self.batch} --global-batch-size {self.batch} "
            f"--train-iters {self.steps} --lr {BASE_LR} --min-lr {MIN_LR} --lr-warmup-iters {self.warmup} "
            f"--lr-decay-iters {self.decay} --lr-decay-style linear --weight-decay {WEIGHT_DECAY} --adam-beta1 0.9 "
            "--adam-beta2 0.95 --adam-eps 1.0e-8 --clip-grad 1.0 --no-create-attention-mask-in-dataloader "
            "--num-workers 0 --eval-iters 0 --eval-interval 100000 --split 100,0,0 --audit-interval 5"
        ).split()

    def factor(self, step: int) -> float:
        """Return the LR of a step (from 1) in units of its peak: linear up and down, times the extra warmup.

        Source: arXiv 2510.19093, eq. 14.
        """
        done = step - 1
        if done <= self.warmup:
            part = done / self.warmup
        else:
            part = 1 - (done - self.warmup) / (self.decay - self.warmup) * (1 - MIN_LR / BASE_LR)
        return float(part * self.m ** min(0.0, done / (self.decay // 4) - 1))

    def trained_with(self, name: str, step: int) -> tuple[float, float]:
        """Return LR and weight decay of a parameter in a step, by rule `sqrt` (arXiv 2510.19093, appendix B.1).

        A matrix and the LM head get eta / sqrt(m) and sqrt(m) lambda; embeddings eta and lambda; gains eta alone.
        """
        if "norm" in name.rpartition(".")[2] or ".norm" in name or "layernorm" in name:
            lr, decay = BASE_LR, 0.0
        elif name.startswith("embedding."):
            lr, decay = BASE_LR, WEIGHT_DECAY
        else:
            lr, decay = BASE_LR / self.m**0.5, WEIGHT_DECAY * self.m**0.5
        return lr * self.factor(step), decay


QUICKSTART = Size(4, 128, 4, 2, 384, 32, 256, 8, 4096, 50, 20, 200, 10)
QUICK = Size(2, 64, 4, 2, 192, 16, 64, 4, 512, 12, 4, 24, 4)


@dataclass(frozen=True)
class CostSize:
    """The model whose steps are timed."""

    layers: int
    hidden: int
    heads: int
    length: int
    batch: int
    cycles: int
    """Of eight steps each, the first of which is to warm up and the last to be traced."""

    @property
    def steps(self) -> int:
        """How many in all."""
        return 8 * self.cycles

    def flags(self) -> list[str]:
        """Return the flags; every fourth step is measured, every eighth with singular values."""
        return (
            f"--num-layers {self.layers} --hidden-size {self.hidden} --num-attention-heads {self.heads} --swiglu "
            f"--ffn-hidden-size {3 * self.hidden} --normalization RMSNorm --disable-bias-linear "
            "--untie-embeddings-and-output-weights --position-embedding-type rope --attention-dropout 0.0 "
            f"--hidden-dropout 0.0 --seq-length {self.length} --max-position-embeddings {self.length} "
            f"--tokenizer-type NullTokenizer --vocab-size {max(1024, self.hidden * 8) - 1} --width-scaling sqrt "
            f"--base-hidden-size {self.hidden // 4} --micro-batch-size {self.batch} --global-batch-size {self.batch} "
            f"--train-iters {self.steps} --lr 1e-4 --lr-warmup-iters 2 --lr-decay-style linear --weight-decay 0.1 "
            "--no-create-attention-mask-in-dataloader --num-workers 0 --eval-iters 0 --eval-interval 100000 "
            "--log-interval 1000000 --split 100,0,0 --alignment-interval 4 --spectral-interval 8 --no-report"
        ).split()


BUSY = CostSize(8, 2048, 16, 2048, 4, 8)
SMALL = CostSize(1, 128, 4, 64, 4, 6)
