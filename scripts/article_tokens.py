"""Tokenise whole Wikipedia articles for train_tiny_mamba2.py, without what the default experiments read.

    python scripts/article_tokens.py --to runs/articles.npz FILE_OR_FOLDER...     # Parquet with the columns title and text

An article is left out if it has the title of one of the 32 default excerpts, or shares 13 tokens in a row with one. The
file holds `tokens` (uint16, one article after the other), `starts` of the articles, and `held_out` (32, 128), the excerpts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from tiny_mamba2 import SEQ_LEN

from lscollapse.data import corpus, tokenizers

OVERLAP = 13  # tokens
PRIME = np.uint64(1_000_003)


def fingerprints(tokens: np.ndarray) -> np.ndarray:
    """A 64-bit number for every run of OVERLAP tokens: the polynomial in PRIME, modulo 2^64; (n,) -> (n - OVERLAP + 1,)."""
    n = len(tokens) - OVERLAP + 1
    found = np.zeros(max(0, n), dtype=np.uint64)
    for k in range(OVERLAP):
        found = found * PRIME + tokens[k : k + n].astype(np.uint64) + np.uint64(1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path)
    parser.add_argument("--to", type=Path, required=True)
    args = parser.parse_args()
    excerpts = corpus.draw_excerpts(n_excerpts=32, n_tokens=SEQ_LEN, seed=0).excerpts
    held_out = np.array([excerpt.ids for excerpt in excerpts], dtype=np.uint16)
    titles = {excerpt.title.casefold() for excerpt in excerpts}
    known = np.unique(np.concatenate([fingerprints(row) for row in held_out]))
    tokenizer = tokenizers.bert()
    files = [f for s in args.sources for f in (sorted(s.glob("*.parquet")) if s.is_dir() else [s])]
    kept: list[np.ndarray] = []
    same_title = overlapping = 0
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(1000, columns=["title", "text"]):
            rows = list(zip(batch["title"].to_pylist(), batch["text"].to_pylist(), strict=True))
            wanted = [text for title, text in rows if title.casefold() not in titles]
            same_title += len(rows) - len(wanted)
            for ids in tokenizer.encode_batch(wanted):
                tokens = np.array(ids, dtype=np.uint16)
                if np.isin(fingerprints(tokens), known).any():
                    overlapping += 1
                elif len(tokens):
                    kept.append(tokens)
    lengths = np.array([len(tokens) for tokens in kept])
    starts = np.concatenate([[0], lengths.cumsum()[:-1]])
    args.to.parent.mkdir(parents=True, exist_ok=True)
    np.savez(args.to, tokens=np.concatenate(kept), starts=starts, held_out=held_out)
    print(
        f"{len(kept)} articles, {lengths.sum()} tokens; left out: {same_title} by title, {overlapping} that share {OVERLAP}"
        f" tokens with a default excerpt"
    )


if __name__ == "__main__":
    main()
