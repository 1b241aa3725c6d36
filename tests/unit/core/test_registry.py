"""The registry: published sizes against closed forms, and what a name, a folder or a hub id stands for."""

import subprocess
import sys

import pytest

from lscollapse.core.registry import ENTRIES, ModelNameError, embedded_files, resolve
from lscollapse.data import tokenizers
from lscollapse.data.corpus import CorpusError


def mamba2_parameters(d, n_layer, vocab=50288, state=128, head=64, conv=4, expand=2, groups=1):
    """Closed form, from the shapes in Dao and Gu (2024), section 7 and the released block."""
    inner = expand * d
    heads = inner // head
    channels = inner + 2 * groups * state
    in_proj = d * (inner + channels + heads)
    layer = d + in_proj + channels * (conv + 1) + 3 * heads + inner + inner * d
    return vocab * d + n_layer * layer + d


def encoder_layer(hidden, inner):
    """Four projections of attention, two of the feed-forward net, two layer norms."""
    return 4 * (hidden + 1) * hidden + (hidden + 1) * inner + (inner + 1) * hidden + 4 * hidden


def albert_parameters(hidden, inner, vocab=30000, embedding=128):
    embeddings = (vocab + 512 + 2) * embedding + 2 * embedding
    return embeddings + (embedding + 1) * hidden + encoder_layer(hidden, inner)


def bert_parameters(hidden, inner, n_layers, vocab=30522):
    return (vocab + 512 + 2) * hidden + 2 * hidden + n_layers * encoder_layer(hidden, inner)


SIZES = {"130m": (768, 24), "370m": (1024, 48), "780m": (1536, 48), "1.3b": (2048, 48), "2.7b": (2560, 64)}


@pytest.mark.parametrize("size", SIZES)
def test_parameters_of_the_released_mamba2(size):
    assert ENTRIES[f"mamba2-{size}"].n_parameters == mamba2_parameters(*SIZES[size])


def test_mamba2_2_7b_has_the_count_of_the_release():
    assert ENTRIES["mamba2-2.7b"].n_parameters == 2_702_599_680


@pytest.mark.parametrize(("size", "hidden"), [("base", 768), ("large", 1024), ("xlarge", 2048), ("xxlarge", 4096)])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_parameters_of_albert(size, hidden, version):
    assert ENTRIES[f"albert-{size}-{version}"].n_parameters == albert_parameters(hidden, 4 * hidden)


def test_parameters_of_the_others():
    assert ENTRIES["bert-base-uncased"].n_parameters == bert_parameters(768, 3072, 12)
    assert ENTRIES["minilm-l6"].n_parameters == bert_parameters(384, 1536, 6)
    assert ENTRIES["albert-smiles"].n_parameters == albert_parameters(256, 512, vocab=591)


def test_names_are_unique_and_only_packages_are_embedded():
    assert all(name == entry.name for name, entry in ENTRIES.items())
    embedded = {"mamba2-tiny", "s4d-digits", "minilm-l6", "albert-smiles"}
    assert {name for name, entry in ENTRIES.items() if entry.embedded} == embedded


def test_folder_and_hub_id(tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    folder.mkdir()
    entry = resolve(folder)
    assert (entry.source, entry.name, entry.location) == ("folder", "mine", str(folder))
    monkeypatch.chdir(tmp_path)
    assert resolve("mine").source == "folder"
    assert resolve("owner/name.v1").source == "hub"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mamba2-130", "did you mean 'mamba2-130m'"),
        ("albert-base", "did you mean 'albert-base-v"),
        ("xyzzy", "known are mamba2-tiny"),
        ("./nowhere", "no folder ./nowhere"),
        ("a/b/c", "not a hub id"),
    ],
)
def test_unknown_names(name, says):
    with pytest.raises(ModelNameError) as caught:
        resolve(name)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mistyped_relative_path_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNameError, match=r"the folder models has no folder mien \(did you mean models/mine\?\)"):
        resolve("models/mien")
    with pytest.raises(ModelNameError, match="no folder models/"):
        resolve("models/mine2/")
    with pytest.raises(
        CorpusError, match="tokenizer 'models/mien' cannot be loaded: the folder models has no folder mien"
    ):
        tokenizers.named("models/mien")
    with pytest.raises(CorpusError, match="no folder nowhere"):
        tokenizers.named("nowhere")
    assert resolve("mamba2-130m").location == "state-spaces/mamba2-130m"
    (tmp_path / "state-spaces").mkdir()
    assert resolve("mamba2-130m").source == "hub"  # a known name is no path
    assert resolve("owner/name").location == "owner/name"


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelNameError, match="give the folder"):
        resolve(tmp_path / "model.safetensors")


def test_embedded_files_exist():
    for name in ("minilm-l6", "albert-smiles"):
        assert all(file.is_file() for file in embedded_files(ENTRIES[name]))


def test_registry_imports_nothing_heavy():
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('registry', {sys.modules[resolve.__module__].__file__!r})\n"
        "module = sys.modules['registry'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
