"""What a lambda-skip does to training: small Mamba-2 nets trained with lambda fixed or learnt, with the gate and without.

    python scripts/lambda_from_scratch.py --articles runs/articles.npz --out runs/lambda-from-scratch --device cuda

One JSON line an arm goes to arms.jsonl in --out, and arms that stand there already are not trained again. Each has the
held-out loss, whole and without the last quarter of the layers, relative mu and the relative update ||O_k|| / ||X_k+1|| of
every block on the 32 default excerpts (mean over excerpts), and the lambdas at the end.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_mamba2 import SEQ_LEN, TinyMamba2, initial_embedding
from train_tiny_mamba2 import article_ids, batches, held_out_loss, learning_rate, optimizer_of, set_rates, update_of

from lscollapse import measures
from lscollapse.core import allocation

ARMS = ("1", "2", "0.5", "4", "-1", "learnt from 1", "learnt from -1", "-2", "0")


@torch.no_grad()
def profile(model: TinyMamba2, held_out: np.ndarray) -> dict[str, list[float]]:
    """relative_mu of X_0..X_K and ||O_k|| / ||X_k+1|| of every block, means over the excerpts."""
    stream = [X.double().cpu() for X in model.stream(torch.from_numpy(held_out).to(model.lam.device))]
    updates = []
    for X, Y, lam in zip(stream, stream[1:], model.lam.tolist(), strict=False):
        sizes = [torch.linalg.vector_norm(T.flatten(1), dim=1) for T in (Y - lam * X, Y)]
        updates.append(float((sizes[0] / sizes[1]).mean()))
    return {"relative_mu": [float(measures.relative_mu(X).mean()) for X in stream], "relative_update": updates}


def arm(name: str, gating: bool, seed: int, articles: list[np.ndarray], held_out: np.ndarray, args: Any) -> dict:
    """Train one arm and look at it."""
    began = time.monotonic()
    embedding = initial_embedding(seed, borrowed=False)
    lam = float(name.rsplit(" ", 1)[-1])
    model = TinyMamba2(embedding, seed, args.layers, args.compile, lam, gating).to(args.device)
    model.lam.requires_grad_(name.startswith("learnt"))
    optimizer = optimizer_of(model, args.lr)
    update = update_of(model, optimizer, args.batch, 0.0)
    losses = []
    for step, (ids, targets) in enumerate(itertools.islice(batches(articles, seed, args.batch, 0), args.steps)):
        set_rates(optimizer, learning_rate(step, args.steps, args.lr))
        losses.append(update(ids, targets).clone())
    curve = torch.stack(losses).tolist()
    tenth = max(1, args.steps // 10)
    return {
        "lambda": name, "gating": gating, "seed": seed, "layers": args.layers, "steps": args.steps, "batch": args.batch,
        "tokens": args.steps * args.batch * SEQ_LEN, "lr": args.lr, "device": args.device,
        "train_loss": [float(np.mean(curve[i : i + tenth])) for i in range(0, args.steps, tenth)],
        "held_out_loss": held_out_loss(model, held_out),
        "without_last_quarter": held_out_loss(model, held_out, args.layers * 3 // 4),
        "lambdas": model.lam.tolist(), **profile(model, held_out), "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--articles", type=Path, required=True, help="file of scripts/article_tokens.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", default=ARMS, help="numbers, or 'learnt from NUMBER'")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="needs a C++ compiler")
    args = parser.parse_args()
    allocation.keep_freed_memory()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "arms.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    known = {(row["lambda"], row["gating"], row["seed"]) for row in done}
    articles, held_out = article_ids(args.articles)
    for seed, gating, name in itertools.product(args.seeds, (False, True), args.arms):
        if (name, gating, seed) in known:
            continue
        row = arm(name, gating, seed, articles, held_out, args)
        with file.open("a") as handle:
            handle.write(json.dumps(row) + "\n")
        last = row["relative_mu"][-1]
        print(
            f"lambda {name:15s} gate {'on ' if gating else 'off'} seed {seed}  held out {row['held_out_loss']:.3f}"
            f"  without the last quarter {row['without_last_quarter']:.3f}  relative mu {last:.3f}"
            f"  lambdas {min(row['lambdas']):.2f}..{max(row['lambdas']):.2f}  {row['seconds']} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
