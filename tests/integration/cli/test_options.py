"""The options of the verbs: flags in their order, one description a setting, one configuration for the verb."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from lscollapse.cli.app import app
from lscollapse.cli.options import takes
from lscollapse.core.config import Experiment, WikipediaSection
from lscollapse.experiments.table1.schema import Table1

SWEEP = (
    "config model lambdas lambdas-file excerpts tokens source titles tokenizer skip-site norm-site gating dtype device kernels"
    " products seed random-init offline certified-exit stream max-memory quality gradients engine address set out yscale"
)
FLAGS = {
    "sweep-lambda": SWEEP,
    "ablate-gating": SWEEP.replace(" gating", "").replace(" set out yscale", " all-readings set out"),
    "ablate-s4d": "config model excerpts source dtype device seed random-init offline engine address retrain set out",
    "table1": "config device workers engine address set out to",
    "train": "task mixer lam lam-init lr steps seed config device set out",
    "measure": "lambdas lambdas-file excerpts tokens source tokenizer skip-site gating dtype device seed random-init offline"
    " stream max-memory set out yscale",
    "find-lambda": "target tol estimate-only excerpts tokens source tokenizer gating seed offline max-memory set out",
    "bound": "a target tol excerpts tokens source tokenizer gating seed offline max-memory set out",
    "doctor": "config model set",
    "check-identity": "excerpts tokens source tokenizer dtype offline set",
    "excerpts": "source titles excerpts tokens tokenizer seed config set",
}
SCHEMAS: dict[str, type[Experiment | Table1]] = {"table1": Table1, "train": Table1}


def verbs() -> dict[str, Any]:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    return {**commands, **commands["theory"].commands}


def options(verb: str) -> Iterator[Any]:
    return (parameter for parameter in verbs()[verb].params if parameter.param_type_name == "option")


@pytest.mark.parametrize("verb", FLAGS)
def test_flags_in_their_order(verb: str) -> None:
    assert [option.opts[0].removeprefix("--") for option in options(verb)] == FLAGS[verb].split()


@pytest.mark.parametrize("verb", FLAGS)
def test_a_flag_that_is_a_setting_has_the_descriptions_of_the_schema(verb: str) -> None:
    fields = SCHEMAS.get(verb, Experiment).model_fields
    titles = WikipediaSection.model_fields["titles"].description
    described = {"model": fields["models"].description, "titles": titles} if "models" in fields else {}
    described |= {name: field.description for name, field in fields.items()}
    compared = 0
    for option in options(verb):
        if option.name in described:
            assert described[option.name] and option.help.startswith(described[option.name]), option.name
            compared += 1
    assert compared >= 1


@pytest.mark.parametrize("name", sorted(set(Experiment.model_fields) - {"cache_dir", "wikipedia", "retrain"}))
def test_every_setting_of_an_experiment_is_described(name: str) -> None:
    assert str(Experiment.model_fields[name].description).endswith(".")


def test_the_default_is_that_of_the_schema_or_of_the_verb() -> None:
    found = {verb: {option.name: option for option in options(verb)} for verb in ("sweep-lambda", "find-lambda")}
    assert found["sweep-lambda"]["tokens"].help.endswith(r"\[default: 128]")
    assert found["sweep-lambda"]["excerpts"].default is None and found["find-lambda"]["excerpts"].default == 8
    assert "[default" not in found["find-lambda"]["excerpts"].help  # Typer says 8 itself
    assert found["sweep-lambda"]["gating"].default is None and found["find-lambda"]["gating"].default is True
    assert found["sweep-lambda"]["gating"].secondary_opts == ["--no-gating"]
    assert found["sweep-lambda"]["quality"].secondary_opts == []


def test_a_verb_gets_one_configuration_and_its_own_parameters(tmp_path: Path) -> None:
    """A file under flags under --set; a flag that is not given leaves the file alone."""
    seen: list[Any] = []

    @takes("config", "models", "lambdas", "tokens", "excerpts", "titles", "offline", "much", "settings", excerpts=3)
    def verb(experiment: Experiment, out: Path, much: Annotated[bool, typer.Option("--much")] = False) -> None:
        """A verb."""
        seen.extend((experiment, out, much))

    file = tmp_path / "a.yaml"
    file.write_text("tokens: 10\nseed: 4\nlambdas: [7]\n", encoding="utf-8")
    one = typer.Typer()
    one.command()(verb)
    given = [
        "x",
        "--config",
        str(file),
        "--model",
        "a",
        "--model",
        "b",
        "--lambdas=-1,2",
        "--titles",
        "t.txt",
        "--much",
    ]
    result = CliRunner().invoke(one, [*given, "--set", "tokens=12"], catch_exceptions=False)
    assert result.exit_code == 0
    experiment, out, much = seen
    assert (experiment.models, experiment.lambdas, experiment.tokens) == (["a", "b"], [-1.0, 2.0], 12)
    assert (experiment.excerpts, experiment.seed, experiment.offline) == (3, 4, False)
    assert (experiment.wikipedia.titles, out, much) == (Path("t.txt"), Path("x"), True)
