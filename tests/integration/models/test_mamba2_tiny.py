"""The shipped Mamba-2 is really trained: its held-out loss through transformers' own model, against a unigram model."""

from __future__ import annotations

import numpy as np
import torch
from transformers import Mamba2ForCausalLM

from lscollapse.data import corpus, texts, tokenizers
from lscollapse.models.checkpoints.checkpoint import load


def test_held_out_loss_is_far_under_the_unigram_model() -> None:
    backbone = load("mamba2-tiny").model
    model = Mamba2ForCausalLM(backbone.config).eval()
    model.backbone = backbone
    model.lm_head.weight = backbone.embeddings.weight
    held_out = corpus.packaged_excerpts()
    titles = {excerpt.title for excerpt in held_out.excerpts}
    ids = torch.tensor([excerpt.ids for excerpt in held_out.excerpts])
    with torch.no_grad():
        loss = np.mean([float(model(block, labels=block).loss) for block in ids.split(8)])
    encode = tokenizers.bert().encode_batch
    training = np.concatenate(encode([text for title, text in texts.packaged_articles() if title not in titles]))
    counts = np.bincount(training, minlength=30522) + 1.0
    unigram = -np.log(counts / counts.sum())[ids.numpy()].mean()
    assert loss < unigram - 1.7, (loss, unigram)
