"""The experiment schema: what the documents promise, precedence, and one clear line for every mistake."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import yaml

from lscollapse.core import registry
from lscollapse.core.config import ConfigError, Experiment, configure, parse_lambdas
from tests import ROOT

CONFIGS = ROOT / "configs"
load = partial(configure, Experiment)


def test_defaults() -> None:
    found = load()
    assert found.models == ["mamba2-tiny", "minilm-l6", "albert-smiles"]
    assert found.lambdas == [-8, -4, -2, -1, -0.5, 0, 0.5, 1, 2, 4, 8]
    assert (found.excerpts, found.tokens, found.seed, found.source) == (32, 128, 0, "packaged")
    assert (found.skip_site, found.norm_site, found.gating, found.device) == ("residual", "both", None, "auto")
    assert not found.random_init and not found.offline


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.name)
def test_configurations_that_ship(file: Path) -> None:
    found = load(file)
    for key, value in yaml.safe_load(file.read_text(encoding="utf-8")).items():
        if not isinstance(value, dict):
            assert getattr(found, key) == value
    for name in found.models:
        registry.resolve(name)


def test_embedded_configuration_is_the_default() -> None:
    assert load(CONFIGS / "embedded.yaml") == load()


def test_precedence(tmp_path: Path) -> None:
    """File under flags under --set; a flag that was not given (None) leaves the file alone."""
    file = tmp_path / "a.yaml"
    file.write_text("tokens: 10\nexcerpts: 3\nseed: 4\nwikipedia: {language: de, contact: someone}\n", encoding="utf-8")
    found = load(file, {"tokens": 11, "excerpts": None, "gating": False}, ["tokens=12", "wikipedia.language=fr"])
    assert (found.tokens, found.excerpts, found.seed, found.gating) == (12, 3, 4, False)
    assert (found.wikipedia.language, found.wikipedia.contact) == ("fr", "someone")


def test_settings_are_yaml() -> None:
    found = load(settings=["lambdas=[2, -1, 0.5]", "models=[a, b]", "random_init=true", "source=x=y.txt"])
    assert found.lambdas == [-1.0, 0.5, 2.0]
    assert str(load(settings=["lambdas=[-0.0, 1e-320, 1e39]"]).lambdas) == "[0.0, 1e-320, 1e+39]"
    assert found.models == ["a", "b"]
    assert found.random_init is True
    assert found.source == "x=y.txt"


def test_lists_of_lambdas() -> None:
    assert parse_lambdas("-8,-0.5, 0,1e-3") == [-8.0, -0.5, 0.0, 0.001]
    for text in ("", "1,,2", "1;2", "one", "1,2,"):
        with pytest.raises(ConfigError, match="--lambdas takes numbers"):
            parse_lambdas(text)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lamdas=[1]", "unknown setting 'lamdas', did you mean 'lambdas'"),
        ("exerpts=3", "did you mean 'excerpts'"),
        ("wikipedia.langage=de", "unknown setting 'wikipedia.langage', did you mean 'language'"),
        ("zzz=1", "unknown setting 'zzz': known are models, "),
        ("tokens", "--set takes key=value, got 'tokens'"),
        ("tokens=1", "tokens: .* greater than or equal to 2, got 1"),
        ("tokens=many", "tokens: .*got 'many'"),
        ("excerpts=0", "excerpts: .*got 0"),
        ("seed=-1", "seed: .*got -1"),
        ("seed.x=1", "seed"),
        ("models=[]", "models: "),
        ("lambdas=[]", "lambdas: "),
        ("lambdas=[1, .nan]", "lambdas.1: input should be a finite number, got nan"),
        ("lambdas=[1, .inf]", "lambdas.1: input should be a finite number, got inf"),
        ("lambdas=[1, 2, 1.0]", "lambdas: a lambda is given twice"),
        ("lambdas=[0.0, -0.0]", "lambdas: a lambda is given twice"),
        ("dtype=float16", "dtype: .*'float32', 'bfloat16' or 'float64'"),
        ("skip_site=nowhere", "skip_site: .*residual"),
        ("norm_site=nowhere", "norm_site: .*mixer"),
        ("lambdas=[1, 2", "lambdas"),  # not YAML
        ("=3", "unknown setting"),
    ],
)
def test_mistakes_are_one_line(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(settings=["seed=1", setting])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["models: [a", "- a\n- b\n", "just words", "", "3: 4\n", "\tx: 1"])
def test_files_that_are_no_configuration(tmp_path: Path, text: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no configuration file .*nothing\.yaml"):
        load(tmp_path / "nothing.yaml")
