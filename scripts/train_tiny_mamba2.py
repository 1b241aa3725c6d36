"""Train `mamba2-tiny`: a real, small Mamba-2 language model on the packaged Wikipedia summaries.

    python scripts/train_tiny_mamba2.py --out runs/tiny            # trains, or continues where it stopped
    python scripts/train_tiny_mamba2.py --out runs/tiny --export lscollapse/models/weights/mamba2-tiny

The architecture is Mamba-2 exactly as transformers' Mamba2ForCausalLM computes it (pre-norm, gated RMSNorm, depthwise
causal conv, one group, tied embeddings); the weights are saved in that layout. The default 32 excerpts of the
experiments are held out. Matrix products run in bfloat16 with float32 accumulation, everything else in float32.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "4294967296")
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", "8589934592")
if os.environ.get("LSCOLLAPSE_MALLOC") != "set":  # glibc reads its settings before main(), so they need a fresh process
    os.environ["LSCOLLAPSE_MALLOC"] = "set"
    os.execv(sys.executable, [sys.executable, *sys.argv])

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lscollapse import assets, corpus

SHAPE = {
    "hidden_size": 128,
    "num_hidden_layers": 48,
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
SEP = 102  # BERT's [SEP] between articles


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.bfloat16(), weight.bfloat16()).float()


def matmul(a: Tensor, b: Tensor) -> Tensor:
    return (a.bfloat16() @ b.bfloat16()).float()


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + SHAPE["layer_norm_epsilon"]) * weight


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
    dropout: float,
) -> Tensor:
    """One Mamba-2 block in the dual (quadratic) form, right for sequences of one chunk."""
    B, L, _ = x.shape
    H, P = SHAPE["num_heads"], SHAPE["head_dim"]
    E, S = H * P, SHAPE["state_size"]
    z, xBC, dt = linear(rms_norm(x, norm), in_proj).split([E, E + 2 * S, H], -1)
    padded = F.pad(xBC, (0, 0, 3, 0))
    xBC = F.silu(conv_bias + sum(padded[:, k : k + L] * conv_weight[:, 0, k] for k in range(4)))
    u, Bm, Cm = xBC.split([E, S, S], -1)
    dt = F.softplus(dt + dt_bias).transpose(1, 2)  # (B, H, L)
    log_decay = (dt * -torch.exp(A_log)[:, None]).cumsum(-1)  # (B, H, L)
    causal = torch.ones(L, L, dtype=torch.bool).tril()
    gaps = torch.where(causal, log_decay[..., :, None] - log_decay[..., None, :], -torch.inf)
    scores = matmul(Cm, Bm.transpose(1, 2))  # (B, L, L), shared by the heads of the one group
    u = u.view(B, L, H, P).transpose(1, 2)  # (B, H, L, P)
    y = matmul(gaps.exp() * scores[:, None], u * dt[..., None]) + u * D[:, None, None]
    y = y.transpose(1, 2).reshape(B, L, E)
    return x + F.dropout(linear(rms_norm(y * F.silu(z), mixer_norm), out_proj), dropout, dropout > 0)


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of tied logits, in blocks of rows: the (tokens, vocabulary) matrix never exists whole."""

    @staticmethod
    def forward(ctx, x: Tensor, embedding: Tensor, targets: Tensor) -> Tensor:  # type: ignore[override]
        rows = 128
        weight = embedding.bfloat16()
        grad_x = torch.empty_like(x)
        grad_w = torch.zeros_like(embedding)
        total = x.new_zeros(())
        for start in range(0, len(x), rows):
            block = x[start : start + rows].bfloat16()
            target = targets[start : start + rows, None]
            logits = (block @ weight.T).float()
            logits -= logits.amax(-1, keepdim=True)
            picked = logits.gather(1, target)
            probabilities = logits.exp_()
            normaliser = probabilities.sum(-1, keepdim=True)
            total += (normaliser.log() - picked).sum()
            probabilities /= normaliser * len(x)
            probabilities.scatter_add_(1, target, torch.full_like(picked, -1.0 / len(x)))
            probabilities = probabilities.bfloat16()
            grad_x[start : start + rows] = (probabilities @ weight).float()
            grad_w += (probabilities.T @ block).float()
        ctx.save_for_backward(grad_x, grad_w)
        return total / len(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        grad_x, grad_w = ctx.saved_tensors
        return grad_x * grad, grad_w * grad, None


class TinyMamba2(nn.Module):
    """Parameters named as in the HuggingFace layout, in a flat dictionary (dots become slashes)."""

    LAYER_KEYS = ("norm.weight", "mixer.in_proj.weight", "mixer.conv1d.weight", "mixer.conv1d.bias", "mixer.dt_bias",
                  "mixer.A_log", "mixer.D", "mixer.norm.weight", "mixer.out_proj.weight")  # fmt: skip

    def __init__(self, embedding: Tensor, seed: int, compiled: bool) -> None:
        super().__init__()
        self.n_layers = SHAPE["num_hidden_layers"]
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

    def __getitem__(self, key: str) -> Tensor:
        return self.weights[key.replace(".", "/")]

    def export(self) -> dict[str, Tensor]:
        return {key.replace("/", "."): value.detach() for key, value in self.weights.items()}

    def forward(self, ids: Tensor, targets: Tensor, dropout: float = 0.0) -> Tensor:
        x = F.dropout(F.embedding(ids, self["backbone.embeddings.weight"]), dropout, dropout > 0)
        for k in range(self.n_layers):
            x = self.block(x, *(self[f"backbone.layers.{k}.{key}"] for key in self.LAYER_KEYS), dropout)
        x = rms_norm(x, self["backbone.norm_f.weight"])
        return HeadLoss.apply(x.flatten(0, 1), self["backbone.embeddings.weight"], targets.flatten())


def initial_embedding(seed: int) -> Tensor:
    """MiniLM's word embeddings, centred and projected on their first principal axes: (vocabulary, d).

    A million tokens are too few to learn 30,522 words from nothing; the words' neighbourhoods are borrowed.
    """
    words = load_file(assets.locate(assets.MINILM_WEIGHTS))["embeddings.word_embeddings.weight"].double()
    words = words - words.mean(0)
    _, axes = torch.linalg.eigh(words.T @ words)
    projected = (words @ axes[:, -SHAPE["hidden_size"] :]).float()
    projected = projected / projected.std(0)
    noise = torch.randn(projected.shape, generator=torch.Generator().manual_seed(seed))
    return 0.04 * projected + 0.005 * noise


def article_ids() -> tuple[list[list[int]], np.ndarray]:
    """Token ids of every training article, and the held-out excerpts (32, 128)."""
    held_out = corpus.packaged_excerpts(n_excerpts=32, n_tokens=SEQ_LEN, seed=0).excerpts
    titles = {excerpt.title for excerpt in held_out}
    articles = [(title, text) for title, text in corpus.packaged_articles() if title not in titles]
    tokenizer = corpus.bert_tokenizer()
    ids = tokenizer.encode_batch([text for _, text in articles])
    return ids, np.array([excerpt.ids for excerpt in held_out])


def batches(articles: list[list[int]], seed: int, batch: int, step: int):
    """Endless (ids, targets), each (batch, 128), from `step` on: articles in a new order every epoch, packed."""
    n_tokens = sum(len(a) + 1 for a in articles)
    per_epoch = (n_tokens - SEQ_LEN) // SEQ_LEN // batch
    while True:
        epoch, first = divmod(step, per_epoch)
        rng = np.random.default_rng([seed, epoch])
        stream = np.concatenate([[*articles[i], SEP] for i in rng.permutation(len(articles))])
        stream = stream[rng.integers(SEQ_LEN) :]
        windows = np.lib.stride_tricks.sliding_window_view(stream, SEQ_LEN + 1)[::SEQ_LEN]
        order = rng.permutation(per_epoch * batch).reshape(per_epoch, batch)
        for rows in order[first:]:
            block = torch.from_numpy(windows[rows].astype(np.int64))
            yield block[:, :-1], block[:, 1:]
            step += 1


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 100 steps, constant, then linear to zero over the last 40 %."""
    return peak * min(1.0, (step + 1) / 100, (steps - step) / (0.4 * steps))


def save_atomic(state: object, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def held_out_loss(model: TinyMamba2, held_out: np.ndarray) -> float:
    ids = torch.from_numpy(held_out)
    losses = []
    with torch.no_grad():  # 127 predictions an excerpt; the last input column only pads to the compiled shape
        for start in range(0, len(ids), 16):
            x = ids[start : start + 16]
            hidden = F.embedding(x, model["backbone.embeddings.weight"])
            for k in range(model.n_layers):
                hidden = model.block(hidden, *(model[f"backbone.layers.{k}.{key}"] for key in model.LAYER_KEYS), 0.0)
            hidden = rms_norm(hidden, model["backbone.norm_f.weight"])[:, :-1]
            targets = x[:, 1:]
            losses.append(HeadLoss.apply(hidden.flatten(0, 1), model["backbone.embeddings.weight"], targets.flatten()))
    return float(torch.stack(losses).mean())


def train(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    articles, held_out = article_ids()
    model = TinyMamba2(initial_embedding(args.seed), args.seed, args.compile)
    decayed = [p for key, p in model.weights.items() if "_proj" in key or "embeddings" in key]
    plain = [p for key, p in model.weights.items() if "_proj" not in key and "embeddings" not in key]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    step, spent = 0, 0.0
    checkpoint, log = args.out / "state.pt", args.out / "loss.csv"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["seconds"]
        print(f"continuing at step {step}", flush=True)
    else:
        log.write_text("step,tokens,seconds,train_loss,held_out_loss\n")
    began, running = time.monotonic() - spent, 0.0
    for ids, targets in batches(articles, args.seed, args.batch, step):
        if step >= args.steps:
            break
        torch.manual_seed(args.seed * 1_000_003 + step)  # dropout of this step, so that a resumed run draws the same
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        loss = model(ids, targets, args.dropout)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        running += float(loss.detach())
        step += 1
        if not math.isfinite(running):
            raise SystemExit(f"loss is {running} at step {step}: lower --lr")
        if step % 100 == 0 or step == args.steps:
            spent = time.monotonic() - began
            count = 100 if step % 100 == 0 else step % 100
            held = held_out_loss(model, held_out)
            row = (step, step * args.batch * SEQ_LEN, f"{spent:.0f}", f"{running / count:.4f}", f"{held:.4f}")
            with log.open("a") as handle:
                handle.write(",".join(map(str, row)) + "\n")
            print("step {}  tokens {}  {}s  train {}  held out {}".format(*row), flush=True)
            running = 0.0
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": spent}
            save_atomic(state, checkpoint)


def unigram_loss(articles: list[list[int]], held_out: np.ndarray) -> float:
    """Held-out nats per token of the unigram model of the training articles (add-one smoothing)."""
    counts = np.bincount(np.concatenate(articles), minlength=SHAPE["vocab_size"]) + 1.0
    return float(-np.log(counts / counts.sum())[held_out].mean())


def export(args: argparse.Namespace) -> None:
    """Write the half-precision checkpoint, its config and its training record."""
    from transformers import Mamba2Config

    articles, held_out = article_ids()
    model = TinyMamba2(initial_embedding(args.seed), args.seed, compiled=False)
    untrained = held_out_loss(model, held_out)
    state = torch.load(args.out / "state.pt", weights_only=True)
    model.load_state_dict(state["model"])
    half = {key: value.to(torch.float16) for key, value in model.export().items()}
    model.load_state_dict({"weights." + key.replace(".", "/"): value.float() for key, value in half.items()})
    args.export.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.contiguous() for key, value in half.items()}
    save_file(tensors, args.export / "model.safetensors", {"format": "pt"})
    config = Mamba2Config(**SHAPE, tie_word_embeddings=True, residual_in_fp32=True, chunk_size=SEQ_LEN, use_bias=False,
                          use_conv_bias=True, bos_token_id=101, eos_token_id=102, pad_token_id=0,
                          architectures=["Mamba2ForCausalLM"])  # fmt: skip
    config.save_pretrained(args.export)
    record = {
        "parameters": sum(value.numel() for value in half.values()),
        "steps": state["step"],
        "tokens_seen": state["step"] * args.batch * SEQ_LEN,
        "tokens_in_training_text": sum(map(len, articles)),
        "seconds": round(state["seconds"]),
        "held_out_nats": {
            "trained": round(held_out_loss(model, held_out), 4),
            "unigram": round(unigram_loss(articles, held_out), 4),
            "untrained": round(untrained, 4),
        },
        "seed": args.seed,
        "peak_learning_rate": args.lr,
        "dropout": args.dropout,
        "batch": args.batch,
        "sha256": hashlib.sha256((args.export / "model.safetensors").read_bytes()).hexdigest(),
    }
    (args.export / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    (args.export / "loss.csv").write_text((args.out / "loss.csv").read_text())
    print(json.dumps(record, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the training state and the loss curve")
    parser.add_argument("--export", type=Path, help="write the checkpoint here instead of training")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="needs a C++ compiler")
    args = parser.parse_args()
    export(args) if args.export else train(args)


if __name__ == "__main__":
    main()
