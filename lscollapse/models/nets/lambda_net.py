"""The nets of Table 1 (arXiv:2410.10609v3): one block with a lambda-skip, round one of four mixers.

    X <- lam X + O,    O = mixer(norm(X)),    then X <- X + MLP(norm(X)), with a plain skip.

lam is one number a layer: fixed, or a parameter that training learns.

Deviation: `shape: author_code` keeps two things of `paper` that the authors' code (jsie7/ssm-benchmark) has otherwise:
attention and MLP have a LayerNorm each, not one for both, and the classifier is linear, without a hidden layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from lscollapse.core.config import Lambda32, Layers, Section, Width
from lscollapse.core.outside import checked
from lscollapse.models.nets.attention import Attention
from lscollapse.models.nets.mamba import Mamba
from lscollapse.models.nets.mamba2 import BareSSD, Mamba2

LEARNABLE = "learnable"
Mixer = Literal["attention", "linear", "mamba", "mamba2"]
# The order of config.json, in which a mixer comes first and the settings that a section does not have lie between.
ORDER = (
    "model_type", "mixer", "hidden_size", "num_hidden_layers", "state_size", "heads", "head_dim", "expand", "vocab_size",
    "n_labels", "reads", "output", "causal", "positions", "max_positions", "norm", "mlp", "mlp_ratio", "tied",
    "embedding_std", "dropout", "lam", "lam_init", "shape",
)  # fmt: skip


class NetError(ValueError):
    """A net that cannot be built, or is asked for what it does not have."""


class NetSection(Section):
    """What a configuration says of a net; the defaults are the paper's for MQAR (Appendix A.13).

    Attributes:
        hidden_size: d, the channels of the stream.
        state_size: n, the state of a channel (`mamba`) or of a head (`mamba2`).
        heads: of the attention mixers.
        head_dim: channels of a head of `mamba2`.
        expand: channels inside a Mamba mixer, over d.
        causal: whether attention sees no later position; the Mamba mixers never do.
        positions: learned position embeddings; None stands for: with the attention mixers.
        norm: LayerNorm `pre`: of what enters mixer and MLP, and of the last output; or `post`: of lam X + O and after
            the MLP.
        mlp: whether the block has an MLP, of mlp_ratio * d hidden channels.
        tied: the classes' weights are the token embeddings.
        embedding_std: of the token and position embeddings at the start. O of an untrained mixer is of size 0.1 or so:
            it drowns embeddings of 0.02 (as GPT-2 has them), and the nets then learn to recall far later than from 1.
        dropout: of O and of the MLP's output.
        shape: `author_code`: as in the authors' public code, Mamba mixers are followed by GELU and a GLU, `mamba2` is a
            bare SSD (one head, expansion 1, no gate, convolution or norm), and attention has state_size channels of
            keys; `paper`: the published architectures.
    """

    hidden_size: Width = 128
    num_hidden_layers: Layers = 2
    state_size: Width = 64
    heads: Width = 1
    head_dim: Width = 64
    expand: int = Field(default=2, ge=1, le=1024)
    causal: bool = True
    positions: bool | None = None
    norm: Literal["pre", "post"] = "pre"
    mlp: bool = True
    mlp_ratio: float = Field(default=4.0, gt=0, le=1024)
    tied: bool = False
    embedding_std: float = Field(default=1.0, ge=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    shape: Literal["paper", "author_code"] = "paper"


class NetConfig(NetSection):
    """Shape of a net: a NetSection, and what follows from the task and the cell.

    Attributes:
        mixer: `attention` (softmax), `linear` (attention with elu + 1), `mamba` (S6) or `mamba2` (SSD).
        vocab_size: ids 0..vocab_size-1 that there are; of pixels the grey levels.
        n_labels: classes of the output.
        reads: `tokens`, through an embedding, or `pixels`, grey values through a linear map.
        output: logits at `each` position, or once, of the `pooled` (mean) stream.
        max_positions: longest sequence that has position embeddings.
        lam: the fixed lambda of all layers, or `learnable`.
        lam_init: where a learnable lambda starts.
    """

    model_type: Literal["lambda_net"] = "lambda_net"
    mixer: Mixer = "attention"
    vocab_size: int = Field(default=8192, ge=2, le=2**24)
    n_labels: int = Field(default=8192, ge=1, le=2**24)
    reads: Literal["tokens", "pixels"] = "tokens"
    output: Literal["each", "pooled"] = "each"
    max_positions: int = Field(default=1024, ge=1, le=2**24)
    lam: Lambda32 | Literal["learnable"] = 1.0
    lam_init: Lambda32 = -1.0

    @model_validator(mode="after")
    def _fits(self) -> NetConfig:
        inner = self.expand * self.hidden_size
        if self.mixer == "mamba2" and self.shape == "paper" and inner % self.head_dim:
            raise ValueError(f"{inner} inner channels cannot be cut into heads of {self.head_dim}: change head_dim")
        if self.is_attention and (self.hidden_size % self.heads or self.keys % self.heads):
            raise ValueError(
                f"{self.hidden_size} channels and {self.keys} of keys do not divide into {self.heads} heads"
            )
        if self.tied and (self.reads != "tokens" or self.n_labels != self.vocab_size):
            raise ValueError("tied needs tokens as input and as many classes as tokens: n_labels = vocab_size")
        return self

    @property
    def is_attention(self) -> bool:
        return self.mixer in ("attention", "linear")

    @property
    def keys(self) -> int:
        """Channels of queries and keys of attention, over all heads."""
        return self.state_size if self.shape == "author_code" else self.hidden_size

    @property
    def has_positions(self) -> bool:
        return self.is_attention if self.positions is None else self.positions

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NetConfig:
        """The config of a config.json; NetError names what is wrong with it."""
        return checked(cls, values, NetError)

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ORDER}


def make_mixer(config: NetConfig) -> nn.Module:
    """The mixer of one layer, (B, N, d) -> (B, N, d)."""
    d, n = config.hidden_size, config.state_size
    if config.is_attention:
        return Attention(d, config.heads, config.keys, linear=config.mixer == "linear", causal=config.causal)
    if config.mixer == "mamba":
        mixer: nn.Module = Mamba(d, n, config.expand)
    else:
        mixer = BareSSD(d, n) if config.shape == "author_code" else Mamba2(d, n, config.head_dim, config.expand)
    if config.shape == "paper":
        return mixer
    return nn.Sequential(mixer, nn.GELU(), nn.Dropout(config.dropout), nn.Linear(d, 2 * d), nn.GLU())


class Block(nn.Module):
    """lam X + O, then the MLP; (B, N, d) -> (B, N, d). `lam` is a parameter if learnable, else a float."""

    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.pre = config.norm == "pre"
        learnable = config.lam == LEARNABLE
        self.lam = nn.Parameter(torch.tensor(float(config.lam_init))) if learnable else float(config.lam)
        self.norm = nn.LayerNorm(d)
        self.mixer = make_mixer(config)
        self.dropout = nn.Dropout(config.dropout)
        if config.mlp:
            hidden = round(config.mlp_ratio * d)
            self.mlp_norm = nn.LayerNorm(d)
            self.mlp: nn.Module | None = nn.Sequential(nn.Linear(d, hidden), nn.GELU(), nn.Linear(hidden, d))
        else:
            self.mlp = None

    def forward(self, X: Tensor) -> Tensor:  # (B, N, d) -> (B, N, d)
        if self.pre:
            X = self.lam * X + self.dropout(self.mixer(self.norm(X)))
            return X if self.mlp is None else X + self.dropout(self.mlp(self.mlp_norm(X)))
        X = self.norm(self.lam * X + self.dropout(self.mixer(X)))
        return X if self.mlp is None else self.mlp_norm(X + self.dropout(self.mlp(X)))


class Net(nn.Module):
    """Embedding, blocks, the last norm (of `pre`), and the linear map to classes."""

    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        self.config = config
        d = config.hidden_size
        tokens = config.reads == "tokens"
        self.encoder = nn.Embedding(config.vocab_size, d) if tokens else nn.Linear(1, d)
        self.positions = nn.Embedding(config.max_positions, d) if config.has_positions else None
        for table in (self.encoder, self.positions):
            if isinstance(table, nn.Embedding):
                nn.init.normal_(table.weight, std=config.embedding_std)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(d) if config.norm == "pre" else nn.Identity()
        self.decoder = None if config.tied else nn.Linear(d, config.n_labels)

    def embed(self, ids: Tensor) -> Tensor:
        """Ids (B, N) -> X, the input of the first block, (B, N, d); NetError where N > max_positions."""
        X: Tensor
        if self.config.reads == "tokens":
            X = self.encoder(ids)  # (B, N, d)
        else:  # grey scaled to [-1, 1], (B, N, 1) -> (B, N, d)
            dtype = self.encoder.weight.dtype
            X = self.encoder(ids[..., None].to(dtype) * (2 / (self.config.vocab_size - 1)) - 1)
        if self.positions is None:
            return X
        N, longest = ids.shape[1], self.config.max_positions
        if longest < N:
            raise NetError(f"{N} positions, the net has embeddings for {longest}: set max_positions")
        return X + self.positions.weight[:N]

    def forward(self, ids: Tensor, at: Tensor | None = None) -> Tensor:
        """Logits.

        Args:
            ids: (B, N) integers.
            at: (B, P) int64, the positions to give logits at; all if None.

        Returns:
            (B, P, n_labels), or (B, n_labels) of a net with pooled output, which takes no `at`.
        """
        if at is not None and self.config.output == "pooled":
            raise NetError("a pooled net has one output a sequence: give no positions")
        X = self.embed(ids)
        for layer in self.layers:
            X = layer(X)  # (B, N, d)
        if at is not None:
            X = X.gather(1, at[..., None].expand(-1, -1, X.shape[-1]))  # (B, P, d)
        X = self.norm(X)
        if self.config.output == "pooled":
            X = X.mean(1)  # (B, d)
        return F.linear(X, self.encoder.weight) if self.decoder is None else self.decoder(X)

    def lams(self) -> list[float]:
        """lambda of every layer."""
        return [float(torch.as_tensor(layer.lam).detach()) for layer in self.layers]

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """For an optimiser: matrices with weight decay; lambda, norms, biases and what makes up dt, A and D without."""
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in self.named_parameters():
            groups[parameter.ndim > 1 and not name.endswith("A_log")].append(parameter)
        return [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]
