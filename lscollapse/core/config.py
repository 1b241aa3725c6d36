"""The experiment schema. YAML files, flags and `--set key=value` all end here; an unknown key is an error naming the nearest."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from lscollapse.core.files import read_text
from lscollapse.core.outside import checked, one_line, refuse_odd, shown
from lscollapse.core.table import DEFAULT_MEASURES, RESOLVE, chosen_measures

EMBEDDED_MODELS = ["mamba2-tiny", "minilm-l6", "albert-smiles"]
DEFAULT_LAMBDAS = [-8.0, -4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0, 8.0]
CC_BY_SA = "CC BY-SA 4.0"


class ConfigError(ValueError):
    """A configuration has an unknown key or a value that is not allowed."""


class Section(BaseModel):
    """Part of a configuration; it refuses keys that it does not know and names the nearest."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        unknown = [str(key) for key in values if key not in cls.model_fields] if isinstance(values, dict) else []
        if unknown:
            near = difflib.get_close_matches(unknown[0], cls.model_fields, n=1)
            # Fields of the section itself come before those that it inherits.
            known = sorted(cls.model_fields, key=lambda name: name not in cls.__annotations__)
            hint = f", did you mean {near[0]!r}?" if near else f": known are {', '.join(known)}"
            raise PydanticCustomError("unknown_key", "{key}", {"key": unknown[0], "hint": hint})
        return values


Schema = TypeVar("Schema", bound=Section)


class WikipediaSection(Section):
    """How to reach Wikipedia, the source `wikipedia`; `titles` is a file with one title a line.

    `contact` (an e-mail address or a web page) goes into the User-Agent; Wikipedia asks for it. `endpoint` is the URL
    of another MediaWiki's api.php (a mirror, a private wiki), `licence` that of its texts. `retry_wait` (seconds) doubles
    with each of `max_retries`, unless the server says how long to wait.
    Articles and the random draw of a seed are kept in `cache_dir`, by default `wikipedia` in the run's `cache_dir` or
    in LSCOLLAPSE_CACHE (~/.cache/lscollapse): every model of a run and a run that is continued read the same texts.
    """

    language: str = "en"
    contact: str = ""
    endpoint: str | None = None
    titles: Path | None = Field(default=None, description="File with one Wikipedia title a line (source wikipedia).")
    cache_dir: Path | None = None
    max_retries: int = Field(default=5, ge=0)
    retry_wait: float = Field(default=1.0, ge=0)
    licence: str = CC_BY_SA


class S4DTraining(Section):
    """How an S4D is trained; the defaults make s4d-digits. `model` has fields of S4DConfig that do not follow from the data."""

    data: str = "digits"
    epochs: int = Field(default=16, ge=1)
    batch: int = Field(default=24, ge=1)
    lr: float = Field(default=2e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup: float = Field(default=0.1, ge=0, le=1)
    seed: int = Field(default=0, ge=0)
    save_every: int = Field(default=30, ge=1)
    crops: bool = False  # random crops and flips, for square images
    model: dict[str, Any] = Field(default={})


class Compute(Section):
    """What computes the rows: device, processes or cluster. It decides none of them."""

    device: str = Field(default="auto", description="auto, cpu or cuda.")
    engine: Literal["local", "ray"] = Field(
        default="local", description="local, or ray: work items as tasks of a Ray cluster."
    )
    address: str | None = Field(
        default=None, description="Of a Ray cluster: auto or HOST:PORT; by default one is started here."
    )
    gpus_per_item: float | None = Field(default=None, gt=0, description="GPUs of a Ray cluster that a work item takes.")
    workers: int | None = Field(
        default=None,
        ge=1,
        description="Processes on this machine; by default one for each GPU, else one; of `table1` one for each core, or one on a GPU.",
    )


class Experiment(Compute):
    """Everything that decides the rows of a run, and what computes them."""

    models: list[str] = Field(
        default=EMBEDDED_MODELS,
        min_length=1,
        description="Short name, folder, GGUF file or hub id; repeat for several.",
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of a model of the hub.")
    lambdas: list[float] = Field(
        default=DEFAULT_LAMBDAS, min_length=1, description='Comma-separated, such as "-2,0,0.5,1".'
    )
    lambdas_file: Path | None = Field(
        default=None, description="CSV layer,lam: one lambda per layer, measured beside the others."
    )
    excerpts: int = Field(default=32, ge=1, description="How many excerpts, or held-out images.")
    tokens: int = Field(default=128, ge=2, description="Tokens of each excerpt.")
    source: str = Field(
        default="packaged",
        description="packaged, wikipedia, datasets, smiles, or a .txt, .jsonl or .parquet file; for models that read images "
        "digits, cifar10 or a folder of pictures, packaged being what the net was trained on.",
    )
    tokenizer: str | None = Field(
        default=None,
        description="bert, native (the model's own), or a folder or hub id; by default bert, but native for `measure`.",
    )
    gating: bool | None = Field(
        default=None,
        description="Only with, or only without the gate, refused where none is known; a sweep takes both by default.",
    )
    skip_site: Literal["residual", "mixer", "ffn", "both"] = Field(
        default="residual", description="residual; mixer for Mamba; ffn or both for transformers."
    )
    norm_site: Literal["both", "mixer", "block"] = Field(
        default="both", description="Which norm LN=False removes: mixer, block or both."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = Field(
        default="auto",
        description="float32, bfloat16 or float64; auto is float32, and float64 for variants without the norm of the blocks or "
        "that float32 does not resolve.",
    )
    resolve: float = Field(
        default=RESOLVE,
        gt=0,
        lt=1,
        description="Rounding that leaves a number unresolved: absolute for relative measures, else relative to it.",
    )
    measures: list[str] = Field(
        default=list(DEFAULT_MEASURES),
        description="Which measures: a list of names, or all (docs/table.md).",
    )
    kernels: Literal["auto", "native", "torch", "triton", "mamba-ssm"] = Field(
        default="auto",
        description="Of Mamba-2: auto, native (the package's own C++, on a CPU), triton (its own on a GPU), mamba-ssm or torch.",
    )
    products: Literal["split", "ieee"] = Field(
        default="split",
        description="float32 products of the triton kernels: split, on tensor cores, or ieee; others are always ieee.",
    )
    seed: int = Field(default=0, ge=0, description="Which excerpts are drawn, and random initial weights.")
    random_init: bool = Field(default=False, description="Measure freshly initialised weights too.")
    certified_exit: bool = Field(default=True, description="Skip layers that provably change nothing.")
    quality: bool = Field(default=False, description="Language-model loss of every variant on the same excerpts too.")
    gradients: bool = Field(default=False, description="Norm of the loss gradient at every layer too, in float32.")
    stream: Literal["auto", "always", "never"] = Field(
        default="auto", description="Read weights layer by layer: auto, always or never."
    )
    max_memory: str = Field(default="2GiB", description="Bound on memory when streaming.")
    offline: bool = Field(default=False, description="Make no call to the hub.")
    cache_dir: Path | None = None
    wikipedia: WikipediaSection = WikipediaSection()
    retrain: S4DTraining = S4DTraining(epochs=4)

    @field_validator("lambdas")
    @classmethod
    def _finite_and_distinct(cls, values: list[float]) -> list[float]:
        if not all(math.isfinite(v) for v in values):
            raise ValueError("lambdas must be finite numbers")
        if len(set(values)) != len(values):
            raise ValueError("a lambda is given twice")
        return sorted(v + 0.0 for v in values)  # -0 becomes 0

    @field_validator("measures", mode="before")
    @classmethod
    def _known_measures(cls, value: Any) -> Any:
        named = isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))
        return list(chosen_measures(value)) if named else value

    @field_validator("workers", "address", "gpus_per_item")
    @classmethod
    def _of_the_engine(cls, value: Any, others: ValidationInfo) -> Any:
        engine = "local" if others.field_name == "workers" else "ray"
        if value is not None and others.data.get("engine") != engine:
            raise ValueError(f"this is for engine {engine}")
        return value

    @field_validator("max_memory")
    @classmethod
    def _a_size(cls, text: str) -> str:
        if parse_memory(text) <= 0:
            raise ValueError("max_memory is a size such as 2GiB or 800MiB")
        return text


def parse_memory(text: str) -> int:
    """ "2GiB", "1.5G", "800M" or a number of bytes, as bytes; units are binary. 0 for what is no size."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", text, re.IGNORECASE)
    return int(float(found[1]) * 2 ** (10 * "_kmgt".find(found[2].lower() or "_"))) if found else 0


def configure(
    schema: type[Schema],
    file: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    settings: list[str] | None = None,
) -> Schema:
    """What a YAML file says of `schema`, overridden by flags (None = not given), then by `key=value` settings.

    Raises:
        ConfigError: one line: what came, what is allowed.
    """
    values: dict[str, Any] = {}
    if file is not None:
        values = _read_yaml(file)
    values |= {key: value for key, value in (flags or {}).items() if value is not None}
    for setting in settings or []:
        key, separator, text = setting.partition("=")
        if not separator:
            raise ConfigError(f"--set takes key=value, got {shown(setting)!r}")
        target = values
        *parents, leaf = key.strip().split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ConfigError(f"--set {key}: {parent} is not a section")
        try:
            target[leaf] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"--set {key}: {shown(text)!r} is not a YAML value") from None
    return checked(schema, values, ConfigError)


def shipped(name: str) -> Path:
    """A file of configs/: in the installed package, or beside it in a checkout."""
    here = Path(__file__).parents[1]
    return next(root / "configs" / name for root in (here, here.parent) if (root / "configs" / name).is_file())


def parse_lambdas(text: str) -> list[float]:
    """A comma-separated list such as "-2,0,0.5" as numbers."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--lambdas takes numbers separated by commas, such as -2,0,0.5,1; got {text!r}") from None


def _read_yaml(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ConfigError(f"no configuration file {file}")
    try:
        values = yaml.safe_load(read_text(file, ConfigError))
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not YAML: {one_line(str(error))}") from None
    except RecursionError:
        raise ConfigError(f"{file} is not a configuration: values inside values without end") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must hold `key: value` lines")
    refuse_odd(values, str(file), ConfigError)
    return values
