"""The net of `mamba2-tiny`, written to be trained: Mamba-2 in its dual form, with lambda on every skip.

The same function as transformers' Mamba2ForCausalLM where lambda is 1 and the gate is on. Matrix products run in bfloat16
with float32 accumulation, everything else in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from lscollapse.core import assets

SHAPE = {
    "hidden_size": 128,
    "expand": 2,
    "head_dim": 64,
    "num_heads": 4,
    "state_size": 64,
    "conv_kernel": 4,
    "n_groups": 1,
    "vocab_size": 30522,
    "layer_norm_epsilon": 1e-5,
}
SEQ_LEN = 128
HEAD_ROWS = {"cpu": 128, "cuda": 8192}  # tokens whose logits exist at a time


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.bfloat16(), weight.bfloat16()).float()


def matmul(a: Tensor, b: Tensor) -> Tensor:
    return (a.bfloat16() @ b.bfloat16()).float()


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    # At lambda = 4 the stream of 48 layers reaches 1e29: its squares would overflow. The result does not depend on `size`.
    size = x.detach().abs().amax(-1, keepdim=True).clamp_min(1.0)
    x = x / size
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + SHAPE["layer_norm_epsilon"] / size / size) * weight


def mamba2_block(
    x: Tensor,  # (B, L, d)
    norm: Tensor,
    in_proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    mixer_norm: Tensor,
    out_proj: Tensor,
    lam: Tensor,  # ()
    gating: bool,
    dropout: float,
) -> Tensor:
    """lam X + O of one Mamba-2 block in the dual (quadratic) form, right for sequences of one chunk."""
    B, L, _ = x.shape
    H, P = SHAPE["num_heads"], SHAPE["head_dim"]
    E, S = H * P, SHAPE["state_size"]
    z, xBC, dt = linear(rms_norm(x, norm), in_proj).split([E, E + 2 * S, H], -1)
    padded = F.pad(xBC, (0, 0, 3, 0))
    xBC = F.silu(conv_bias + sum(padded[:, k : k + L] * conv_weight[:, 0, k] for k in range(4)))
    u, Bm, Cm = xBC.split([E, S, S], -1)
    dt = F.softplus(dt + dt_bias).transpose(1, 2)  # (B, H, L)
    log_decay = (dt * -torch.exp(A_log)[:, None]).cumsum(-1)  # (B, H, L)
    causal = torch.ones(L, L, dtype=torch.bool, device=x.device).tril()
    gaps = torch.where(causal, log_decay[..., :, None] - log_decay[..., None, :], -torch.inf)
    scores = matmul(Cm, Bm.transpose(1, 2))  # (B, L, L), shared by the heads of the one group
    u = u.view(B, L, H, P).transpose(1, 2)  # (B, H, L, P)
    y = matmul(gaps.exp() * scores[:, None], u * dt[..., None]) + u * D[:, None, None]
    y = y.transpose(1, 2).reshape(B, L, E)
    gated = y * F.silu(z) if gating else y
    return lam * x + F.dropout(linear(rms_norm(gated, mixer_norm), out_proj), dropout, dropout > 0)


def head_block(x: Tensor, weight: Tensor, targets: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Summed cross-entropy of some rows, and the gradients of its n-th part by x and by the output matrix.

    x (rows, d) and weight (vocabulary, d) bfloat16, targets (rows,).
    """
    logits = (x @ weight.T).float()
    normaliser = logits.logsumexp(-1, keepdim=True)
    wanted = torch.arange(len(weight), device=x.device) == targets[:, None]
    loss = (normaliser[:, 0] - torch.where(wanted, logits, 0.0).sum(-1)).sum()
    slope = (((logits - normaliser).exp() - wanted.float()) / n).bfloat16()
    return loss, (slope @ weight).float(), (slope.T @ x).float()


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of tied logits, in blocks of rows: the (tokens, vocabulary) matrix never exists whole."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx, x: Tensor, embedding: Tensor, targets: Tensor, block: Callable[..., tuple[Tensor, Tensor, Tensor]]
    ) -> Tensor:
        weight, half = embedding.bfloat16(), x.bfloat16()
        grad_x, grad_w, total = torch.empty_like(x), torch.zeros_like(embedding), x.new_zeros(())
        rows = HEAD_ROWS[x.device.type]
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            loss, grad_x[part], by_weight = block(half[part], weight, targets[part], len(x))
            total += loss
            grad_w += by_weight
        ctx.save_for_backward(grad_x, grad_w)
        return total / len(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        grad_x, grad_w = ctx.saved_tensors
        return grad_x * grad, grad_w * grad, None, None


class TinyMamba2(nn.Module):
    """Parameters named as in the HuggingFace layout, in a flat dictionary (dots become slashes)."""

    LAYER_KEYS = ("norm.weight", "mixer.in_proj.weight", "mixer.conv1d.weight", "mixer.conv1d.bias", "mixer.dt_bias",
                  "mixer.A_log", "mixer.D", "mixer.norm.weight", "mixer.out_proj.weight")  # fmt: skip

    def __init__(
        self, embedding: Tensor, seed: int, n_layers: int, compiled: bool = False, lam: float = 1.0, gating: bool = True
    ) -> None:
        super().__init__()
        self.n_layers, self.gating = n_layers, gating
        self.lam = nn.Parameter(torch.full((n_layers,), lam), requires_grad=False)
        d, H, P, S = SHAPE["hidden_size"], SHAPE["num_heads"], SHAPE["head_dim"], SHAPE["state_size"]
        E = H * P
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, std: float) -> Tensor:
            return torch.randn(*shape, generator=generator) * std

        tensors = {"backbone.embeddings.weight": embedding, "backbone.norm_f.weight": torch.ones(d)}
        for k in range(self.n_layers):
            dt = torch.exp(torch.rand(H, generator=generator) * math.log(100.0) + math.log(1e-3))
            values = (
                torch.ones(d),
                normal(2 * E + 2 * S + H, d, std=d**-0.5),
                (torch.rand(E + 2 * S, 1, 4, generator=generator) - 0.5),
                torch.zeros(E + 2 * S),
                dt + torch.log(-torch.expm1(-dt)),
                torch.log(torch.arange(1.0, H + 1)),
                torch.ones(H),
                torch.ones(E),
                normal(d, E, std=(E * 2 * self.n_layers) ** -0.5),
            )
            tensors.update({f"backbone.layers.{k}.{key}": v for key, v in zip(self.LAYER_KEYS, values, strict=True)})
        self.weights = nn.ParameterDict({key.replace(".", "/"): nn.Parameter(v) for key, v in tensors.items()})
        self.block = torch.compile(mamba2_block, dynamic=False) if compiled else mamba2_block
        self.head_block = torch.compile(head_block, dynamic=False) if compiled else head_block

    def __getitem__(self, key: str) -> Tensor:
        return self.weights[key.replace(".", "/")]

    def export(self) -> dict[str, Tensor]:
        return {key.replace("/", "."): value.detach() for key, value in self.weights.items()}

    def stream(
        self, ids: Tensor, dropout: float = 0.0, block: Callable[..., Tensor] = mamba2_block
    ) -> Iterator[Tensor]:
        """X of the embedding and after every block, (B, L, d)."""
        x = F.dropout(F.embedding(ids, self["backbone.embeddings.weight"]), dropout, dropout > 0)
        yield x
        for k, lam in enumerate(self.lam.unbind()):
            weights = (self[f"backbone.layers.{k}.{key}"] for key in self.LAYER_KEYS)
            x = block(x, *weights, lam, self.gating, dropout)
            yield x

    def loss(self, x: Tensor, targets: Tensor, block: Callable[..., Any] = head_block) -> Tensor:
        """Mean nats a token of the last X."""
        x = rms_norm(x, self["backbone.norm_f.weight"])
        return HeadLoss.apply(x.flatten(0, 1), self["backbone.embeddings.weight"], targets.flatten(), block)

    def forward(self, ids: Tensor, targets: Tensor, dropout: float = 0.0) -> Tensor:
        *_, x = self.stream(ids, dropout, self.block)
        return self.loss(x, targets, self.head_block)


def initial_embedding(seed: int, borrowed: bool) -> Tensor:
    """(vocabulary, d): random, or MiniLM's word embeddings, centred and projected on their first principal axes.

    A million tokens are too few to learn 30,522 words from nothing; the words' neighbourhoods are then borrowed.
    """
    noise = torch.randn(SHAPE["vocab_size"], SHAPE["hidden_size"], generator=torch.Generator().manual_seed(seed))
    if not borrowed:
        return 0.04 * noise
    words = load_file(assets.locate(assets.MINILM_WEIGHTS))["embeddings.word_embeddings.weight"].double()
    words = words - words.mean(0)
    _, axes = torch.linalg.eigh(words.T @ words)
    projected = (words @ axes[:, -SHAPE["hidden_size"] :]).float()
    return 0.04 * projected / projected.std(0) + 0.005 * noise
