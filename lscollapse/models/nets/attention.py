"""Two attention mixers: softmax (Vaswani et al., 2017) and linear with elu + 1 (Katharopoulos et al., 2020).

With q, k, v the head's queries, keys and values, and j <= i where the mixer is causal, any j where it is not:

    softmax  o_i = sum_j exp(q_i.k_j / sqrt(p)) v_j / sum_j exp(q_i.k_j / sqrt(p)),    p the size of a key,
    linear   o_i = sum_j phi(q_i).phi(k_j) v_j / sum_j phi(q_i).phi(k_j),              phi(x) = elu(x) + 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 64  # positions between two hand-overs of the state in `linear_attention`


class Attention(nn.Module):
    """out(attention of `heads` heads), with biases as in the usual Transformer; (B, N, d) -> (B, N, d).

    Args:
        d: channels of the stream.
        heads: heads, each with d / heads channels of values.
        keys: channels of queries and of keys over all heads.
        linear: linear attention instead of softmax.
        causal: whether a position sees no later one.
    """

    def __init__(self, d: int, heads: int, keys: int, *, linear: bool, causal: bool) -> None:
        super().__init__()
        self.heads, self.linear, self.causal = heads, linear, causal
        self.q, self.k, self.v = nn.Linear(d, keys), nn.Linear(d, keys), nn.Linear(d, d)
        self.out = nn.Linear(d, d)

    def forward(self, X: Tensor) -> Tensor:
        # (B, heads, N, p), of v (B, heads, N, d / heads)
        q, k, v = (one(X).unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in (self.q, self.k, self.v))
        if self.linear:
            O = linear_attention(F.elu(q) + 1, F.elu(k) + 1, v, self.causal)
        else:
            O = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        Y: Tensor = self.out(O.transpose(1, 2).flatten(2))  # (B, N, d)
        return Y


def linear_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, chunk: int = CHUNK) -> Tensor:
    """o_i = sum_j q_i.k_j v_j / sum_j q_i.k_j over all j, or over j <= i, in time linear in N.

    Within a chunk of positions the causal sum is a masked product; what came before it is a state, the running sum of
    k_j (v_j, 1)^T.

    Args:
        q, k: (B, heads, N, p), positive: after the feature map.
        v: (B, heads, N, m).

    Returns:
        (B, heads, N, m).
    """
    v = F.pad(v, (0, 1), value=1.0)  # the last column sums the weights
    if not causal:
        o = q @ (k.mT @ v)  # (B, h, N, m + 1)
    else:
        N = q.shape[2]
        size = min(chunk, N)
        # (B, h, N, .) -> (B, h, c, size, .): c chunks of `size` positions
        q, k, v = (torch.unflatten(F.pad(t, (0, 0, 0, -N % size)), 2, (-1, size)) for t in (q, k, v))
        states = k.mT @ v  # (B, h, c, p, m + 1), the sum over each chunk
        before = states.cumsum(2) - states  # (B, h, c, p, m + 1), the sum over earlier chunks
        o = ((q @ k.mT).tril() @ v + q @ before).flatten(2, 3)[:, :, :N]  # (B, h, N, m + 1)
    return o[..., :-1] / o[..., -1:]
