"""The paper's own path, small: configs/paper.yaml with other names and sizes, a hub and a Wikipedia on loopback.

The commands run in processes of their own with the stock clients; they are pointed at the servers by HF_ENDPOINT and
`wikipedia.endpoint`, and at nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AlbertConfig, AlbertForMaskedLM

from lscollapse.core import assets
from tests import ROOT
from tests.equivalence.layouts import ORIGINAL_CONFIG, original_state, write_original
from tests.servers.hub import HubServer
from tests.servers.mediawiki import MediaWikiServer, Page

PAPER = ROOT / "configs" / "paper.yaml"
MAMBA, ALBERT = "tiny/mamba2", "tiny/albert"
EXCERPTS, TOKENS, LAYERS = 3, 8, {MAMBA: 3, ALBERT: 2}
BERT_VOCABULARY, PADDED = 30522, 30528  # the multiple of 16 that mamba_ssm pads it to

PAGES = {
    "Lamp": Page("A lamp."),  # too short
    "Lighthouse": Page("The lighthouse keeper wrote down the weather every evening before the lamp was lit."),
    "Light": Page("Light may refer to: a lamp, a colour, a weight, and many another thing.", disambiguation=True),
    "Harbour wall": Page("The harbour wall kept the long waves out of the basin all winter.", in_parts=True),
    "Foghorn": Page("Before the foghorn came, a bell was rung by hand for as long as the fog lay on the water."),
    "Pharos": Page(redirect="Lighthouse"),
}
TAKEN = {"Lighthouse": "1002", "Harbour wall": "1004", "Foghorn": "1005"}


@dataclass
class Site:
    """The two servers, and what a user of them has on disk."""

    hub: HubServer
    wiki: MediaWikiServer
    folder: Path

    def command(self, *arguments: str, home: str = "hf") -> subprocess.CompletedProcess[str]:
        environment = os.environ | {
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.folder / home),
            "HF_HUB_OFFLINE": "0",
            "LSCOLLAPSE_CACHE": str(self.folder / "own"),
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": str(PAPER.parents[1]),
        }
        command = [sys.executable, "-m", "lscollapse", *arguments]
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False, timeout=120
        )

    def run(self, verb: str, *arguments: str, home: str = "hf") -> subprocess.CompletedProcess[str]:
        """A verb on the paper's configuration, made small."""
        sizes = ("--excerpts", str(EXCERPTS), "--tokens", str(TOKENS))
        wiki = ("--set", f"wikipedia.endpoint={self.wiki.endpoint}", "--set", "wikipedia.retry_wait=0")
        return self.command(verb, "--config", str(PAPER), *sizes, *wiki, *arguments, home=home)


def mamba_repo(folder: Path) -> dict[str, bytes]:
    """The layout of state-spaces/mamba2-*: a config of mamba_ssm's and a pickled float16 state dict."""
    state = original_state()
    embedding = torch.randn(PADDED, ORIGINAL_CONFIG["d_model"], generator=torch.Generator().manual_seed(1)).half()
    state |= {"backbone.embedding.weight": embedding, "lm_head.weight": embedding}
    return contents(write_original(folder, state, vocab_size=BERT_VOCABULARY)) | {"README.md": b"# a card"}


def albert_repo(folder: Path) -> dict[str, bytes]:
    """The layout of albert/albert-*-v2: heads beside the base model, and a tokenizer.json."""
    words = sorted({word for page in PAGES.values() for word in page.text.split()})
    pieces = [("<pad>", 0.0), ("<unk>", 0.0), ("[CLS]", 0.0), ("[SEP]", 0.0), ("[MASK]", 0.0)]
    pieces += [(f"▁{word.lower()}", -3.0) for word in words]
    inner = Tokenizer(models.Unigram(list(dict.fromkeys(pieces)), unk_id=1))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    config = AlbertConfig(
        vocab_size=len(words) + 8, embedding_size=12, hidden_size=16, num_hidden_layers=LAYERS[ALBERT],
        num_attention_heads=4, intermediate_size=24, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(2)
    AlbertForMaskedLM(config).save_pretrained(folder)
    inner.save(str(folder / "tokenizer.json"))
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    try:
        assets.locate(assets.BERT_VOCAB)
    except assets.AssetError as error:
        pytest.skip(str(error))
    base = tmp_path_factory.mktemp("site")
    repos = {MAMBA: mamba_repo(base / "mamba"), ALBERT: albert_repo(base / "albert")}
    (base / "user").mkdir()
    with HubServer(repos) as hub, MediaWikiServer(PAGES) as wiki:
        hub.faults.cuts, hub.faults.info, wiki.faults = 1, [429], ["maxlag", "429"]
        yield Site(hub, wiki, base / "user")


@pytest.fixture(scope="module")
def sweep(site: Site) -> Path:
    done = site.run("sweep-lambda", "--model", MAMBA, "--model", ALBERT, "--out", "sweep")
    assert done.returncode == 0, done.stderr
    return site.folder / "sweep"


def test_sweep_of_the_papers_configuration(site: Site, sweep: Path) -> None:
    assert {"figure1.png", "figure2.png"} <= {file.name for file in sweep.iterdir()}
    rows = pd.read_parquet(sweep / "rows.parquet")
    lambdas = yaml.safe_load(PAPER.read_text(encoding="utf-8"))["lambdas"]
    for model, arms in ((MAMBA, 2), (ALBERT, 1)):  # with and without the gate; ALBERT has none
        own = rows[(rows["model"] == model) & (rows["measure"] == "relative_mu")]
        assert len(own) == len(lambdas) * arms * (LAYERS[model] + 1) * EXCERPTS
        assert sorted(set(own["lam"])) == lambdas
        assert set(own["status"]) <= {"ok", "certified", "below_floor"}


def test_rows_name_the_commit_and_the_served_weights(site: Site, sweep: Path) -> None:
    rows = pd.read_parquet(sweep / "rows.parquet")
    for model, weights in ((MAMBA, "pytorch_model.bin"), (ALBERT, "model.safetensors")):
        own = rows[rows["model"] == model]
        assert set(own["revision"]) == {site.hub.commit(model)}
        assert set(own["checkpoint_sha256"]) == {hashlib.sha256(site.hub.repos[model][weights]).hexdigest()}
    assert set(rows.loc[rows["model"] == MAMBA, "tokenizer"]) == {"bert-base-uncased"}
    assert set(rows.loc[rows["model"] == ALBERT, "tokenizer"]) == {f"{ALBERT}@{site.hub.commit(ALBERT)}"}
    assert set(rows["text"]) == {"MediaWiki (127.0.0.1)"}


def test_manifest_names_the_articles(site: Site, sweep: Path) -> None:
    text = (sweep / "manifest.json").read_text(encoding="utf-8")
    assert site.wiki.host not in text and str(site.folder) not in text
    for model in (MAMBA, ALBERT):
        record = json.loads(text)["excerpts"][model]
        assert dict(zip(record["titles"], record["revisions"], strict=True)) == TAKEN
        assert record["text_sha256"] == [hashlib.sha256(PAGES[title].text.encode()).hexdigest() for title in TAKEN]
        assert set(record["licences"]) == {"CC BY-SA 4.0"}
        assert (record["too_short"], record["disambiguation"]) == (1, 1)
        assert record["drawn"] == ["Lamp", "Lighthouse", "Light", "Harbour wall", "Foghorn"]


def test_gating_ablation_reads_the_same_articles_without_asking_again(site: Site, sweep: Path) -> None:
    asked = len(site.wiki.calls)
    done = site.run("ablate-gating", "--model", MAMBA, "--out", "ablation")
    assert done.returncode == 0, done.stderr
    assert (site.folder / "ablation" / "figure3.png").is_file()
    assert len(site.wiki.calls) == asked
    rows = pd.read_parquet(site.folder / "ablation" / "rows.parquet")
    assert set(zip(rows["gating"], rows["layernorm"], strict=True)) == {
        (g, n) for g in (True, False) for n in (True, False)
    }
    assert set(rows["revision"]) == {site.hub.commit(MAMBA)}


def test_what_was_fetched_is_enough_offline(site: Site, sweep: Path) -> None:
    """ALBERT's part of the run from a new hub cache, without a call: weights and tokenizer are fetched, articles kept."""
    done = site.command("fetch", ALBERT, home="fetched")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(site.hub.commit(ALBERT))
    hub, wiki = len(site.hub.calls), len(site.wiki.calls)
    done = site.run("sweep-lambda", "--model", ALBERT, "--out", "again", "--offline", home="fetched")
    assert done.returncode == 0, done.stderr
    assert (len(site.hub.calls), len(site.wiki.calls)) == (hub, wiki)
    rows = pd.read_parquet(sweep / "rows.parquet")
    expected = rows[rows["model"] == ALBERT].reset_index(drop=True)
    pd.testing.assert_frame_equal(pd.read_parquet(site.folder / "again" / "rows.parquet"), expected, check_exact=True)
