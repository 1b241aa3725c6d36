"""`lscollapse measure` on local folders of any architecture, without network: what it reads, prints, writes and refuses."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
import typer
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from lscollapse.cli.model import measure
from lscollapse.cli.terminal import model as terminal
from lscollapse.cli.terminal import paper
from lscollapse.core.config import Experiment
from lscollapse.core.manifest import read_manifest
from lscollapse.core.rows import read_rows
from lscollapse.data import pictures
from lscollapse.data.images import pixel_ids
from lscollapse.experiments import own_model
from lscollapse.models.checkpoints import checkpoint
from lscollapse.models.checkpoints.tensors import CheckpointError
from lscollapse.reports import verdict
from lscollapse.reports.figures.wording import describe
from tests.equivalence import plain_models

WORDS = [f"word{i}" for i in range(50)]
TEXT = "\n\n".join(" ".join(np.random.default_rng(i).choice(WORDS, 30)) for i in range(6))
SIZE = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24, "vocab_size": 55,
        "max_position_embeddings": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LSCOLLAPSE_CACHE", str(tmp_path / "cache"))
    Path("text.txt").write_text(TEXT)


def save(name: str, folder: str, head: str = "CausalLM", tokens: bool = True, **changes: Any) -> Any:
    """A tiny random model as transformers saves it, with a tokenizer of 50 words beside it."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZE | changes)
    model = getattr(transformers, f"AutoModelFor{head}").from_config(config).eval()
    model.save_pretrained(folder)
    if tokens:
        inner = Tokenizer(models.WordLevel({"[UNK]": 0, **{word: i + 3 for i, word in enumerate(WORDS)}}, "[UNK]"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]").save_pretrained(folder)
    return model


def run(*arguments: str) -> str:
    app = typer.Typer()
    app.command()(measure)
    result = CliRunner().invoke(app, [*arguments, "--excerpts", "3", "--tokens", "20"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def word_ids(folder: Path) -> np.ndarray:
    """The excerpts that a run read, by its manifest's digests of the texts and the plain rule of the tokenizer."""
    by_digest = {hashlib.sha256(text.encode()).hexdigest(): text for text in TEXT.split("\n\n")}
    record = next(iter(read_manifest(folder)["excerpts"].values()))
    return np.array([[WORDS.index(w) + 3 for w in by_digest[d].split()[:20]] for d in record["text_sha256"]])


def measured(name: str, **settings: Any) -> pd.DataFrame:
    """The rows of a run without its figure."""
    config = Experiment(
        models=[name], **{"lambdas": [1.0], "excerpts": 3, "tokens": 20, "source": "text.txt"} | settings
    )
    return own_model.measure_own(config, Path(f"rows-{name}"))


def test_a_decoder_in_its_own_tokens() -> None:
    """The whole way from the folder to the figure; the rows against transformers' hidden states."""
    model = save("GPT2", "mine/decoder")
    shown = run("mine/decoder", "--source", "text.txt")
    out = Path("runs/measure/decoder")
    assert "n = 3 excerpts of 20 tokens" in shown and "Tokens: decoder:" in shown and "the model's own" in shown
    assert "decoder, LN, lambda 1: " in shown and "collapse" in shown
    assert {"figure1.png", "figure1.csv", "rows.parquet", "manifest.json"} <= {path.name for path in out.iterdir()}
    assert not (out / "figure2.png").exists()
    assert_rows_are_those_of(model, read_rows(out), out)


def assert_rows_are_those_of(model: Any, rows: pd.DataFrame, out: Path) -> None:
    ids = word_ids(out)
    with torch.no_grad():
        states = model.base_model(torch.as_tensor(ids), output_hidden_states=True).hidden_states
    for layer, excerpt in itertools.product(range(3), range(3)):
        expected = plain_models.plain_measures(states[layer][excerpt].numpy())
        here = rows[(rows["layer"] == layer) & (rows["excerpt"] == excerpt)].set_index("measure")["value"]
        assert here["relative_mu"] == pytest.approx(expected["relative_mu"], rel=1e-4)
    assert set(rows["lam"]) == {1.0} and rows["gating"].isna().all()


@pytest.mark.parametrize(("name", "changes"), [("Llama", {"num_key_value_heads": 2}), ("GPTNeoX", {})])
def test_other_decoders(name: str, changes: dict[str, Any]) -> None:
    model = save(name, "net", **changes)
    assert_rows_are_those_of(model, measured("net"), Path("rows-net"))


def test_several_lambdas_and_a_random_control() -> None:
    save("GPT2", "net")
    shown = run(
        "net", "--source", "text.txt", "--lambdas=-1,0,1", "--random-init", "--skip-site", "both", "--out", "here"
    )
    rows = read_rows(Path("here"))
    assert set(rows["lam"]) == {-1.0, 0.0, 1.0} and set(rows["init"]) == {"trained", "random"}
    assert set(rows["skip_site"]) == {"both"}
    assert "net (random), LN, both skips, lambda -1:" in shown
    assert Path("here/figure2.png").is_file()


def test_a_model_with_a_gate_keeps_it_unless_told_otherwise() -> None:
    save("Mamba", "mamba", state_size=4)
    assert set(measured("mamba")["arm"]) == {"gate, LN"}
    shutil.rmtree("rows-mamba")
    assert set(measured("mamba", gating=False)["arm"]) == {"no gate, LN"}


def test_frozen_excerpts_name_their_tokens_themselves() -> None:
    save("GPT2", "net")
    line = {"ids": list(range(3, 23)), "title": "a", "text_sha256": "0" * 64, "tokenizer": "elsewhere", "source": "s"}
    Path("frozen.jsonl").write_text("".join(json.dumps(line) + "\n" for _ in range(3)))
    assert set(measured("net", source="frozen.jsonl")["tokenizer"]) == {"elsewhere"}
    Path("texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT.split("\n\n")))
    shutil.rmtree("rows-net")
    assert measured("net", source="texts.jsonl")["tokenizer"].str.startswith("net:").all()


def test_vit_on_a_folder_of_pictures_and_on_digits() -> None:
    model = save(
        "ViT", "vit", "ImageClassification", tokens=False, image_size=8, patch_size=4, max_position_embeddings=None
    )
    Path("vit/preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]})
    )
    Path("album/deeper").mkdir(parents=True)
    for i, name in enumerate(["a.png", "b.PNG", "deeper/c.bmp"]):
        pixels = np.random.default_rng(i).integers(0, 256, (11, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(Path("album") / name)
    rows = measured("vit", source="album")
    assert "n = 3 images of 64 pixels" in describe(rows)
    corpus = pictures.picture_excerpts("album", (8, 8), 3, 0)
    processor = transformers.ViTImageProcessor(
        size={"height": 8, "width": 8}, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]
    )
    files = [Image.open(Path("album") / excerpt.title).convert("RGB") for excerpt in corpus.excerpts]
    for file, excerpt in zip(files, corpus.excerpts, strict=True):
        resized = file.resize((8, 8), Image.Resampling.BILINEAR)
        assert list(excerpt.ids) == pixel_ids(resized).tolist()
    with torch.no_grad():
        values = processor([f.resize((8, 8), Image.Resampling.BILINEAR) for f in files], return_tensors="pt")[
            "pixel_values"
        ]
        states = model.base_model(values, output_hidden_states=True).hidden_states
    relative = rows[(rows["measure"] == "relative_mu") & (rows["layer"] == 2)].set_index("excerpt")["value"]
    for excerpt in range(3):
        expected = plain_models.plain_measures(states[2][excerpt].numpy())["relative_mu"]
        assert relative[excerpt] == pytest.approx(expected, rel=1e-4)
    shutil.rmtree("rows-vit")
    assert "handwritten digits" in measured("vit", source="packaged")["text"].iloc[0]
    with pytest.raises(ValueError, match="no pictures 'nowhere'"):
        measured("vit", source="nowhere")


# --- what a folder may hold -----------------------------------------------------------------------


def test_a_checkpoint_is_the_model_that_was_saved() -> None:
    model = save("OPT", "opt", ffn_dim=24, word_embed_proj_dim=16)
    loaded = checkpoint.load("opt")
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).last_hidden_state, model.base_model(ids).last_hidden_state)
    n_parameters = sum(p.numel() for p in model.base_model.parameters())
    assert (loaded.info.architecture, loaded.info.n_layers, loaded.info.n_parameters) == ("opt", 3, n_parameters)
    assert checkpoint.outline("opt") == ("opt", n_parameters)
    fresh = [checkpoint.load("opt", random_init=seed).model.decoder.layers[0].fc1.weight for seed in (1, 1, 2)]
    assert torch.equal(fresh[0], fresh[1]) and not torch.equal(fresh[0], fresh[2])


def edit(change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file("net/model.safetensors")
    change(tensors)
    save_file(tensors, "net/model.safetensors", metadata={"format": "pt"})


def edit_config(**changes: Any) -> None:
    config = json.loads(Path("net/config.json").read_text())
    Path("net/config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda: edit(lambda t: t.pop("transformer.h.1.mlp.c_fc.weight")), r"1 missing \(h.1.mlp.c_fc.weight\)"),
        (lambda: edit_config(n_layer=2, num_hidden_layers=2), r"11 unexpected \("),
        (lambda: edit(lambda t: t.update({"transformer.wpe.weight": torch.zeros(9, 9)})), r"of another shape \(wpe"),
        (lambda: Path("net/model.safetensors").write_bytes(b"no such thing"), "cannot be read .cut off or damaged"),
        (lambda: edit_config(model_type="their_own", auto_map={"AutoModel": "theirs.Model"}), "code from its repository"),
        (lambda: edit_config(quantization_config={"bits": 4}), "quantised weights"),
    ],
)  # fmt: skip
def test_folders_that_are_refused(damage: Callable[[], Any], message: str) -> None:
    save("GPT2", "net")
    damage()
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load("net")


def test_a_folder_without_a_tokenizer_says_what_to_do() -> None:
    save("GPT2", "net", tokens=False)
    with pytest.raises(ValueError, match=r"tokenizer 'net' cannot be loaded: .*name another with --tokenizer"):
        measured("net")


# --- the verdict ----------------------------------------------------------------------------------


def table(relative: list[float], rank1: list[float] | None = None, lost: int | None = None) -> pd.DataFrame:
    """Two excerpts, 0.01 above and below the curves given, for layers 0.."""
    rows = []
    curves = {
        "relative_mu": relative,
        "rank1_residual": rank1 or relative,
        "stable_rank": relative,
        "mean_cosine": relative,
    }
    for name, curve in curves.items():
        for layer, value in enumerate(curve):
            for excerpt, change in enumerate((0.01, -0.01)):
                gone = lost is not None and layer >= lost and excerpt == 1
                rows.append({"model": "m", "init": "trained", "arm": "LN", "lam": 1.0, "dtype": "float32", "layer": layer,
                             "measure": name, "value": np.nan if gone else value + change,
                             "status": "overflow" if gone else "ok", "excerpt": excerpt})  # fmt: skip
    return pd.DataFrame(rows)


def unresolved(
    relative: list[float], *layers: int, measure: str = "relative_mu", dtype: str = "float32", lost: int | None = None
) -> pd.DataFrame:
    """The same with one excerpt of two unresolved at `layers`: its number stays in `value`."""
    rows = table(relative, lost=lost).assign(dtype=dtype)
    rows.loc[rows["layer"].isin(layers) & (rows["excerpt"] == 1) & (rows["measure"] == measure), "status"] = (
        "unresolved"
    )
    return rows


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (table([0.2, 0.9, 0.6, 0.7]), "does not collapse: relative mu stays over 0.5; lowest 0.600 (layer 2), last 0.700"),
        (table([0.9, 0.4, 0.8]), "falls under 0.5 and recovers: relative mu is lowest in layer 1 (0.400), last 0.800"),
        (table([0.9, 0.4, 0.8, 0.3, 0.2, 0.45]),
         "collapses: relative mu is under 0.5 from layer 3 on; lowest 0.200 (layer 4), last 0.450"),
        (table([0.9, 0.4]), "collapses: relative mu is under 0.5 from layer 1 on; lowest 0.400 (layer 1), last 0.400"),
        (table([0.9, 0.8, 0.7, 0.1, 0.1], lost=3), "no verdict: layers 3 to 4 of 4 are missing, where the values of 1 of 2"
         " excerpts leave float32; before that relative mu is lowest in layer 2 (0.700)"),
        (table([0.9, 0.4, 0.1], lost=2), "no verdict: layer 2 of 2 is missing, where the values of 1 of 2 excerpts leave float32;"
         " before that relative mu is lowest in layer 1 (0.400)"),
        (table([0.9, 0.8], lost=0).assign(status="nan"), "no verdict: layers 0 to 1 of 1 are missing, where the values of 2 of 2"
         " excerpts are all zero or no numbers"),
        (table([0.9, 0.8], [0.9, 0.3]), "does not collapse: relative mu stays over 0.5; lowest 0.800 (layer 1), last 0.800;"
         " but the rank-1 residual of the last is 0.300: one direction carries nearly everything (rows at +u and -u, or a"
         " few long rows), which relative mu does not see"),
        (unresolved([0.9, 0.8, 0.7, 0.6], 2, 3), "no verdict: layers 2 to 3 of 3 are unresolved: rounding in float32 decides"
         " them: run with --dtype float64; elsewhere relative mu is lowest in layer 1 (0.800)"),
        (unresolved([0.9, 0.4, 0.3], 2, dtype="float64"), "no verdict: layer 2 of 2 is unresolved: not even float64 resolves"
         " it; elsewhere relative mu is lowest in layer 1 (0.400)"),
        (unresolved([0.9, 0.8, 0.1, 0.7, 0.7], 2), "no verdict: layer 2 of 4 is unresolved: rounding in float32 decides it: run"
         " with --dtype float64; elsewhere relative mu is lowest in layer 3 (0.700)"),
        (unresolved([0.9, 0.8], 0, 1), "no verdict: layer 1 of 1 is unresolved: rounding in float32 decides it: run with --dtype"
         " float64"),
        (unresolved([0.9, 0.8, 0.9, 0.4, 0.4], 2), "collapses: relative mu is under 0.5 from layer 3 on; lowest 0.400 (layer 3),"
         " last 0.400; unresolved in float32: layer 2"),
        (unresolved([0.9, 0.4, 0.4, 0.3, 0.4, 0.45], 1, 3), "collapses: relative mu is under 0.5 from layer 4 on; lowest 0.400"
         " (layer 2), last 0.450; unresolved in float32: layers 1 and 3"),
        (unresolved([0.9, 0.4, 0.1, 0.8], 2), "falls under 0.5 and recovers: relative mu is lowest in layer 1 (0.400), last"
         " 0.800; unresolved in float32: layer 2"),
        (unresolved([0.9, 0.8, 0.7], 2, measure="rank1_residual"), "does not collapse: relative mu stays over 0.5; lowest 0.700"
         " (layer 2), last 0.700; the rank-1 residual of the last is unresolved in float32"),
        (unresolved([0.9, 0.4, 0.1, 0.1], 2, lost=3), "no verdict: layer 3 of 3 is missing, where the values of 1 of 2 excerpts"
         " leave float32; unresolved in float32: layer 2; before that relative mu is lowest in layer 1 (0.400)"),
    ],
)  # fmt: skip
def test_verdicts(rows: pd.DataFrame, expected: str) -> None:
    (arm,) = verdict.arms(rows)
    assert verdict.verdict(arm) == expected


def test_worst_is_of_the_layers_that_are_known() -> None:
    (arm,) = verdict.arms(unresolved([0.9, 0.8, 0.1, 0.7], 2))
    assert arm.worst("relative_mu") == (pytest.approx(0.7), 3)
    assert arm.worst("rank1_residual") == (pytest.approx(0.1), 2)
    assert arm.unresolved == [2]


def test_what_is_shown_of_unresolved_layers(capsys: pytest.CaptureFixture[str]) -> None:
    rows = unresolved([0.9, 0.8, 0.7], 2).assign(text="t", n_tokens=7, tokenizer="bert", backend="cpu")
    terminal.show(rows, own_tokens=False)
    out = capsys.readouterr().out
    relative, rank1 = (re.search(rf"{name} .*", out)[0].split() for name in ("relative mu", "rank1 residual"))
    assert relative[2:] == ["0.900", "0.800", "1", "unresolved"] and rank1[2:] == ["0.900", "0.700", "2", "0.700"]
    assert "no verdict: layer 2 of 2 is unresolved" in out
    paper.last_layer_table(rows)
    assert "unresolved" in capsys.readouterr().out
    paper.arms_table(rows.assign(lam=1.0))
    out = capsys.readouterr().out
    assert "m, LN, lambda 1: layer 2 is unresolved: rounding in float32 decides it: run with --dtype float64" in out
    assert "0.800" in out and "0.700" not in out
