"""What `doctor` finds: this machine, a hub and a MediaWiki on loopback, and what a configuration cannot do here."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer
from huggingface_hub import constants
from transformers import GPT2Config, GPT2LMHeadModel

from lscollapse.cli import results
from lscollapse.core import assets, hub
from lscollapse.core.allocation import available_memory
from lscollapse.core.config import Experiment
from lscollapse.models.kernels import native
from lscollapse.runs import doctor
from lscollapse.runs.model_checks import Diagnosis
from tests.equivalence.layouts import D_MODEL, N_LAYER, PADDED, hf_state, original_state, write_hf, write_original
from tests.servers.hub import HubServer
from tests.servers.mediawiki import MediaWikiServer, Page
from tests.unit.core.test_registry import mamba2_parameters

CONTACT, TOKEN = "someone@example.org", "hf_secret"
ORIGINAL, HF = "tiny/original", "tiny/hf"
CLOSED = "http://127.0.0.1:9"  # the discard port: nothing listens


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[HubServer, MediaWikiServer]]:
    repos = {}
    for name, folder in ((ORIGINAL, write_original(tmp_path / "o", original_state())), (HF, write_hf(tmp_path / "h"))):
        repos[name] = {path.name: path.read_bytes() for path in folder.iterdir()}
    with HubServer(repos) as running, MediaWikiServer({"Lamp": Page("A lamp.")}) as wiki:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("LSCOLLAPSE_CACHE", str(tmp_path / "own"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        endpoint(monkeypatch, running.url)
        yield running, wiki


def endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """What HF_ENDPOINT sets when the client is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def settings(wiki: MediaWikiServer, *models: str, **more: object) -> Experiment:
    values = {"models": list(models or ["mamba2-tiny"]), "wikipedia": {"endpoint": wiki.endpoint, "contact": CONTACT}}
    return Experiment.model_validate(values | more)


def offline(*models: str, **more: object) -> Experiment:
    return Experiment.model_validate({"models": list(models or ["mamba2-tiny"]), "offline": True} | more)


def found(config: Experiment) -> dict[str, Diagnosis]:
    checks = doctor.examine(config)
    assert not any("\n" in check.found + check.mend for check in checks)
    return {check.name: check for check in checks}


def mends(checks: dict[str, Diagnosis]) -> set[str]:
    return {name for name, check in checks.items() if check.mend}


def test_a_configuration_that_needs_nothing_from_outside() -> None:
    checks = found(offline("mamba2-tiny", "s4d-digits"))
    assert not mends(checks)
    assert f"torch {torch.__version__}" in checks["versions"].found
    assert f"Python {sys.version.split()[0]}" in checks["versions"].found
    kernels, note = checks["kernels"].found, native.load()[1]
    assert kernels.endswith("): compiled here, and right to float32") if not note else note in kernels
    assert "lscollapse.models.kernels.ssd.scan" in found(offline(kernels="torch"))["kernels"].found
    assert checks["mamba2-tiny"].found.startswith("embedded; 9,547,712 parameters in memory")
    assert checks["hub"].found.endswith("not asked (offline)") and checks["Wikipedia"].found.endswith(
        "not asked (offline)"
    )
    assert checks["hub"].good and checks["Wikipedia"].good


def test_bfloat16_as_torch_detects_it() -> None:
    """Of x86: torch asks the processor itself, doctor reads what Linux lists."""
    if os.uname().machine != "x86_64":
        pytest.skip("torch's detection is of x86")
    expected = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert found(offline())["bfloat16"].found.startswith("in hardware") == expected


def test_memory_is_what_the_system_has() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < available_memory() <= total


def test_hub_and_wiki_that_answer(
    site: tuple[HubServer, MediaWikiServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, wiki = site
    free = shutil.disk_usage(tmp_path)._replace(free=round(59.53 * 2**30))  # what is free changes while others write
    monkeypatch.setattr(shutil, "disk_usage", lambda place: free)
    checks = found(settings(wiki, ORIGINAL, HF, source="wikipedia"))
    assert not mends(checks)
    assert checks["hub"].found == "127.0.0.1: answers" and checks["Wikipedia"].found == "MediaWiki (127.0.0.1): answers"
    assert [call.query["list"] for call in wiki.calls] == ["random"]
    assert not server.downloads() and not list((tmp_path / "hub").rglob("*.bin"))  # nothing large is fetched
    assert checks["disk"].found.startswith("59.5 GiB free")


def test_sizes_are_those_that_the_hub_serves(site: tuple[HubServer, MediaWikiServer]) -> None:
    server, _ = site
    for name, repo in server.repos.items():
        assert hub.sizes(name) == {file: len(data) for file, data in repo.items()}


def test_zipped_bin_weights_need_room_for_themselves_only(
    site: tuple[HubServer, MediaWikiServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are streamed from their own file: nothing is written beside it."""
    monkeypatch.setattr(hub, "sizes", lambda *_, **__: {"config.json": 0, "pytorch_model.bin": 7 * 2**30})
    checks = found(settings(site[1], ORIGINAL))
    assert checks[ORIGINAL].found.startswith("7.00 GiB to fetch; ") and not checks[ORIGINAL].mend
    assert checks["disk"].found.endswith("free, 7.0 GiB needed")


def test_what_is_in_the_cache_is_not_asked_for(
    site: tuple[HubServer, MediaWikiServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, wiki = site
    hub.fetch(HF)
    endpoint(monkeypatch, CLOSED)
    checks = found(settings(wiki, HF))
    assert not mends(checks)
    assert checks[HF].found.startswith("in the cache; ")
    assert checks["hub"].found == "127.0.0.1: does not answer (ConnectError)" and not checks["hub"].good


def test_hub_and_wiki_that_do_not_answer(
    site: tuple[HubServer, MediaWikiServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the registry's models the size is known, and what memory they take."""
    endpoint(monkeypatch, CLOSED)
    config = Experiment.model_validate({
        "models": ["mamba2-2.7b", HF], "source": "wikipedia", "wikipedia": {"endpoint": f"{CLOSED}/api.php"}, "max_memory": "2GiB"
    })  # fmt: skip
    checks = found(config)
    assert mends(checks) >= {"mamba2-2.7b", HF, "Wikipedia"}
    assert "lscollapse fetch mamba2-2.7b" in checks["mamba2-2.7b"].mend
    assert f"at most {4 * 2_702_599_680 / 2**30:.2f} GiB" in checks["mamba2-2.7b"].found
    assert "2,702,599,680 parameters streamed" in checks["mamba2-2.7b"].found
    assert checks[HF].found == "not in the cache"
    assert "packaged" in checks["Wikipedia"].mend


def test_models_that_the_hub_does_not_give(site: tuple[HubServer, MediaWikiServer]) -> None:
    _, wiki = site
    checks = found(settings(wiki, "tiny/none", "mamba3"))
    assert mends(checks) == {"tiny/none", "mamba3"}
    assert "does not exist" in checks["tiny/none"].mend and "did you mean" in checks["mamba3"].mend


@pytest.mark.parametrize(
    ("more", "name", "mend"),
    [
        ({"device": "cuda:7"}, "device", "cpu"),
        ({"kernels": "triton"}, "kernels", "--kernels torch"),
        ({"source": "nowhere.txt"}, "source", "packaged"),
        ({"models": ["mamba2-130m"]}, "mamba2-130m", "lscollapse fetch"),
        ({"models": ["mamba2-tiny"], "stream": "always", "max_memory": "100MiB"}, "mamba2-tiny", ""),
    ],
)  # fmt: skip
def test_what_cannot_run(more: dict[str, object], name: str, mend: str) -> None:
    check = found(offline(**more))[name]
    assert (mend in check.mend) if mend else not check.mend


def test_too_little_memory_to_stream(site: tuple[HubServer, MediaWikiServer]) -> None:
    """The released 130m in 600 MiB: the bound that a run would refuse."""
    _, wiki = site
    checks = found(settings(wiki, "mamba2-130m", stream="always", max_memory="600MiB"))
    assert "mamba2-130m" in mends(checks)


def test_a_missing_file_of_the_embedded_data(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = assets.Asset("no_such_package", "summaries.json", "0" * 64)
    monkeypatch.setattr(assets, "SUMMARIES", gone)
    monkeypatch.setattr(doctor, "PINNED", (gone, *doctor.PINNED[1:]))
    check = found(offline())["embedded data"]
    assert "no_such_package" in check.mend and check.found.startswith("6 of 7 files")
    check = found(offline(source="smiles"))["embedded data"]
    assert not check.mend and not check.good


def test_a_folder_is_judged_by_its_files(tmp_path: Path) -> None:
    """Weights that are not there, cut off, of another shape or of no floats; and a config.json that says another size."""
    folder = write_hf(tmp_path / "mine")
    name, file = str(folder), folder / "model.safetensors"
    whole = file.read_bytes()
    n_parameters = mamba2_parameters(D_MODEL, N_LAYER, vocab=PADDED, state=8, head=4, groups=2)
    assert found(offline(name))[name].found.startswith(f"a local folder; {n_parameters:,} parameters in memory")
    state = hf_state()
    state["backbone.layers.0.mixer.out_proj.weight"] = state["backbone.layers.0.mixer.out_proj.weight"].to(torch.int8)
    damages = {
        "no weights in": file.unlink,
        "cannot be read (cut off or damaged?": lambda: file.write_bytes(whole[:-100]),
        "9 missing (layers.3.norm.weight": lambda: write_hf(folder, num_hidden_layers=4),
        "out_proj.weight is of dtype int8": lambda: write_hf(folder, state),
        "no config.json in": lambda: (folder / "config.json").unlink(),
    }
    for mend, damage in damages.items():
        damage()
        check = found(offline(name))[name]
        assert check.found == "cannot be used" and mend in check.mend


def test_a_config_of_two_layouts_is_that_of_its_files(tmp_path: Path) -> None:
    name = str(write_original(tmp_path / "mine", model_type="mamba2"))
    n_parameters = mamba2_parameters(D_MODEL, N_LAYER, vocab=PADDED, state=8, head=4, groups=2)
    assert f"; {n_parameters:,} parameters in memory" in found(offline(name))[name].found


def test_a_folder_that_transformers_reads(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    model, name = GPT2LMHeadModel(config), str(tmp_path / "gpt2")
    model.save_pretrained(name)
    n_parameters = sum(p.numel() for p in model.transformer.parameters())
    assert f"a local folder; {n_parameters:,} parameters in memory" in found(offline(name))[name].found
    GPT2Config(**{**config.to_dict(), "n_layer": 3}).save_pretrained(name)
    assert "12 missing (h.2.ln_1.weight" in found(offline(name))[name].mend
    (tmp_path / "gpt2" / "model.safetensors").unlink()
    assert "no weights in" in found(offline(name))[name].mend


def test_a_cache_whose_weights_are_gone(site: tuple[HubServer, MediaWikiServer]) -> None:
    """The snapshot's links are there, what they point to is not."""
    _, wiki = site
    folder = hub.fetch(HF)
    assert found(settings(wiki, HF, offline=True))[HF].found.startswith("in the cache; ")
    (folder / "model.safetensors").resolve().unlink()
    assert HF in mends(found(settings(wiki, HF, offline=True)))


def test_weights_in_the_cache_that_were_altered(site: tuple[HubServer, MediaWikiServer]) -> None:
    _, wiki = site
    weights = (hub.fetch(HF) / "model.safetensors").resolve()
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\1\2\3")
    assert f"{weights} was altered" in found(settings(wiki, HF))[HF].mend


def test_text_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "good.txt").write_text("Lamp")
    bad, good = str(tmp_path / "latin.txt"), str(tmp_path / "good.txt")
    for config, name in (
        (offline(source=bad), "source"),
        (offline(lambdas_file=bad), "lambdas"),
        (offline(wikipedia={"titles": bad}), "titles"),
    ):
        check = found(config)[name]
        assert check.found == "cannot be read" and check.mend.startswith(f"{bad} is not UTF-8 text (byte 3)")
    checks = found(offline(source=good, lambdas_file=good, wikipedia={"titles": good}))
    assert {checks[name].found for name in ("source", "lambdas", "titles")} == {f"{good} is there"}
    assert "give a file" in found(offline(lambdas_file=tmp_path / "gone.csv"))["lambdas"].mend


@pytest.mark.parametrize("contact", ["", "ünï@example.org"])
def test_wikipedia_wants_a_contact(contact: str) -> None:
    config = offline(source="wikipedia", wikipedia={"contact": contact})
    check = found(config)["Wikipedia"]
    assert "wikipedia.contact" in check.mend
    assert not contact or contact not in check.mend + check.found


def test_no_secret_is_shown(
    site: tuple[HubServer, MediaWikiServer], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, wiki = site
    endpoint(monkeypatch, server.url.replace("//", "//user:password@"))
    address = wiki.endpoint.replace("//", "//user:password@")
    with pytest.raises(typer.Exit) as stopped:
        results.doctor(model=["tiny/none"], settings=[f"wikipedia.endpoint={address}", f"wikipedia.contact={CONTACT}"])
    out = capsys.readouterr().out
    assert stopped.value.exit_code == 1
    assert "this configuration cannot run: 1 to mend" in out and "mend: " in out
    for secret in (CONTACT, TOKEN, "password"):
        assert secret not in out


def test_exit_0_where_it_can_run(
    site: tuple[HubServer, MediaWikiServer], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _, wiki = site
    file = tmp_path / "run.yaml"
    file.write_text(f"models: [{HF}]\nwikipedia: {{endpoint: '{wiki.endpoint}'}}\n", encoding="utf-8")
    results.doctor(config=file)
    assert "this configuration can run" in capsys.readouterr().out
