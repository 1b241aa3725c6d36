"""Train `mamba2-tiny`: a real, small Mamba-2 language model on Wikipedia: the packaged summaries, or whole articles.

    python scripts/train_tiny_mamba2.py --out runs/tiny            # trains, or continues where it stopped
    python scripts/train_tiny_mamba2.py --out runs/tiny --export lscollapse/models/weights/mamba2-tiny

    python scripts/article_tokens.py --to runs/articles.npz FOLDER     # Parquet files with the columns title and text
    python scripts/train_tiny_mamba2.py --articles runs/articles.npz --layers 64 --device cuda --batch 256 --steps 6000 \
        --dropout 0 --out runs/tiny-64
    python scripts/train_tiny_mamba2.py --lam 2 --out runs/tiny-lam-2  # with lambda on every skip, fixed

The architecture is Mamba-2 exactly as transformers' Mamba2ForCausalLM computes it (pre-norm, gated RMSNorm, depthwise
causal conv, one group, tied embeddings); the weights are saved in that layout. The default 32 excerpts of the
experiments are held out. Matrix products run in bfloat16 with float32 accumulation, everything else in float32. On a GPU
a step is one CUDA graph: the net is narrow and deep, and would otherwise wait for the launches of its thousands of kernels.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tiny_mamba2 import SEQ_LEN, SHAPE, TinyMamba2, initial_embedding
from torch import Tensor, nn

from lscollapse.core import allocation
from lscollapse.core.files import atomic
from lscollapse.data import corpus, texts, tokenizers

SEP = 102  # BERT's [SEP] between articles
LAMBDA_RATE = 0.01  # of the learning rate: one lambda turns a whole layer, and jumps about at the rate of the matrices


def article_ids(file: Path | None) -> tuple[list[np.ndarray], np.ndarray]:
    """Token ids of every training article, and the held-out excerpts (32, 128)."""
    if file is not None:
        held = np.load(file)
        return np.split(held["tokens"], held["starts"][1:]), held["held_out"].astype(np.int64)
    held_out = corpus.draw_excerpts(n_excerpts=32, n_tokens=SEQ_LEN, seed=0).excerpts
    titles = {excerpt.title for excerpt in held_out}
    articles = [text for title, text in texts.packaged_articles() if title not in titles]
    ids = [np.array(article, dtype=np.uint16) for article in tokenizers.bert().encode_batch(articles)]
    return ids, np.array([excerpt.ids for excerpt in held_out])


def batches(articles: list[np.ndarray], seed: int, batch: int, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (ids, targets), each (batch, 128), from `step` on: articles in a new order every epoch, packed."""
    n_tokens = sum(len(a) + 1 for a in articles)
    per_epoch = (n_tokens - SEQ_LEN) // SEQ_LEN // batch
    separator = np.array([SEP], dtype=articles[0].dtype)
    while True:
        epoch, first = divmod(step, per_epoch)
        rng = np.random.default_rng([seed, epoch])
        stream = np.concatenate([part for i in rng.permutation(len(articles)) for part in (articles[i], separator)])
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
    with atomic(path) as temporary:
        torch.save(state, temporary)


@torch.no_grad()
def held_out_loss(model: TinyMamba2, held_out: np.ndarray, n_layers: int | None = None) -> float:
    """Nats a token over the 127 predictions of every excerpt; of the first `n_layers` blocks alone where given."""
    losses = []
    for ids in torch.from_numpy(held_out).to(model.lam.device).split(16):
        *_, x = itertools.islice(model.stream(ids), None if n_layers is None else n_layers + 1)
        losses.append(model.loss(x[:, :-1], ids[:, 1:]))
    return float(torch.stack(losses).mean())


def optimizer_of(model: TinyMamba2, lr: float) -> torch.optim.AdamW:
    """AdamW, its rates as tensors, so that a captured step reads them anew."""
    device = model.lam.device
    decayed = [p for key, p in model.weights.items() if "_proj" in key or "embeddings" in key]
    plain = [p for key, p in model.weights.items() if "_proj" not in key and "embeddings" not in key]
    groups = [
        {"params": decayed, "weight_decay": 0.1, "relative": 1.0},
        {"params": plain, "weight_decay": 0.0, "relative": 1.0},
    ]
    if model.lam.requires_grad:
        groups.append({"params": [model.lam], "weight_decay": 0.0, "relative": LAMBDA_RATE})
    for group in groups:
        group["lr"] = torch.tensor(lr, device=device)
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True, capturable=device.type == "cuda")


def set_rates(optimizer: torch.optim.AdamW, rate: float) -> None:
    """Give every group its part of `rate`, in the tensors that a captured step reads."""
    for group in optimizer.param_groups:
        group["lr"].fill_(group["relative"] * rate)


def update_of(model: TinyMamba2, optimizer: torch.optim.AdamW, batch: int, dropout: float) -> Callable[..., Tensor]:
    """update(ids, targets) -> loss: one step; on a GPU the replay of a CUDA graph of it."""

    def update(ids: Tensor, targets: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = model(ids, targets, dropout)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    device = model.lam.device
    if device.type == "cpu":
        return update
    ids, targets = torch.zeros(2, batch, SEQ_LEN, dtype=torch.int64, device=device)
    _warm_up(model, optimizer, lambda: update(ids, targets))
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = update(ids, targets)

    def replay(new_ids: Tensor, new_targets: Tensor) -> Tensor:
        ids.copy_(new_ids.pin_memory(), non_blocking=True)
        targets.copy_(new_targets.pin_memory(), non_blocking=True)
        graph.replay()
        return loss

    return replay


def _warm_up(model: TinyMamba2, optimizer: torch.optim.AdamW, update: Callable[[], Tensor]) -> None:
    """Compile and allocate everything by three updates, which leave no trace in weights and optimizer."""
    weights = [p.detach().clone() for p in model.parameters()]
    known = {p: {key: t.clone() for key, t in held.items()} for p, held in optimizer.state.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            update()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.no_grad():
        for p, before in zip(model.parameters(), weights, strict=True):
            p.copy_(before)
        for p, held in optimizer.state.items():
            for key, tensor in held.items():
                tensor.copy_(known[p][key]) if p in known else tensor.zero_()


def train(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    articles, held_out = article_ids(args.articles)
    embedding = initial_embedding(args.seed, borrowed=args.articles is None)
    model = TinyMamba2(embedding, args.seed, args.layers, args.compile, args.lam).to(args.device)
    optimizer = optimizer_of(model, args.lr)
    step, spent = 0, 0.0
    checkpoint, log = args.out / "state.pt", args.out / "loss.csv"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=args.device)
        refuse_other_lam(state, args)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["seconds"]
        print(f"continuing at step {step}", flush=True)
    else:
        log.write_text("step,tokens,seconds,train_loss,held_out_loss\n")
    began = time.monotonic() - spent
    update, running = update_of(model, optimizer, args.batch, args.dropout), torch.zeros((), device=args.device)
    for ids, targets in itertools.islice(batches(articles, args.seed, args.batch, step), args.steps - step):
        torch.manual_seed(args.seed * 1_000_003 + step)  # dropout of this step, so that a resumed run draws the same
        set_rates(optimizer, learning_rate(step, args.steps, args.lr))
        running += update(ids, targets)
        step += 1
        if step % args.every and step != args.steps:
            continue
        spent = time.monotonic() - began
        mean = float(running) / (args.every if step % args.every == 0 else step % args.every)
        if not math.isfinite(mean):
            raise SystemExit(f"loss is {mean} at step {step}: lower --lr")
        row = (
            step,
            step * args.batch * SEQ_LEN,
            f"{spent:.0f}",
            f"{mean:.4f}",
            f"{held_out_loss(model, held_out):.4f}",
        )
        with log.open("a") as handle:
            handle.write(",".join(map(str, row)) + "\n")
        print("step {}  tokens {}  {}s  train {}  held out {}".format(*row), flush=True)
        running.zero_()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": spent}
        save_atomic(state, checkpoint)


def refuse_other_lam(state: dict[str, Any], args: argparse.Namespace) -> None:
    """Stop where --out holds a training with another lambda, which its weights would silently bring along."""
    (held,) = set(state["model"]["lam"].tolist())
    if held != float(np.float32(args.lam)):
        raise SystemExit(f"{args.out} was trained with lambda {held:g}: give --lam {held:g}, or another --out")


def unigram_loss(articles: list[np.ndarray], held_out: np.ndarray) -> float:
    """Held-out nats per token of the unigram model of the training articles (add-one smoothing)."""
    counts = np.bincount(np.concatenate(articles), minlength=SHAPE["vocab_size"]) + 1.0
    return float(-np.log(counts / counts.sum())[held_out].mean())


def export(args: argparse.Namespace) -> None:
    """Write the half-precision checkpoint, its config and its training record."""
    from transformers import Mamba2Config

    articles, held_out = article_ids(args.articles)
    embedding = initial_embedding(args.seed, borrowed=args.articles is None)
    model = TinyMamba2(embedding, args.seed, args.layers, lam=args.lam)
    untrained = held_out_loss(model, held_out)
    state = torch.load(args.out / "state.pt", weights_only=True, map_location="cpu")
    refuse_other_lam(state, args)
    model.load_state_dict(state["model"])
    half = {key: value.to(torch.float16) for key, value in model.export().items()}
    model.weights.load_state_dict({key.replace(".", "/"): value.float() for key, value in half.items()})
    args.export.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.contiguous() for key, value in half.items()}
    save_file(tensors, args.export / "model.safetensors", {"format": "pt"})
    config = Mamba2Config(**SHAPE, num_hidden_layers=args.layers, tie_word_embeddings=True, residual_in_fp32=True, chunk_size=SEQ_LEN, use_bias=False,
                          use_conv_bias=True, bos_token_id=101, eos_token_id=102, pad_token_id=0,
                          architectures=["Mamba2ForCausalLM"], **({} if args.lam == 1 else {"lam": args.lam}))  # fmt: skip
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
        "lam": args.lam,
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
    parser.add_argument(
        "--articles", type=Path, help="file of scripts/article_tokens.py; default the packaged summaries"
    )
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--lam", type=float, default=1.0, help="lambda of every skip, lam X + O; the config records it")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--every", type=int, default=100, help="steps between two lines of loss.csv, each with a save")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="needs a C++ compiler")
    args = parser.parse_args()
    allocation.keep_freed_memory()
    export(args) if args.export else train(args)


if __name__ == "__main__":
    main()
