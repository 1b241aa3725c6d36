"""The experiment schema. YAML files, flags and `--set key=value` all end here; an unknown key is an error naming the nearest."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from lscollapse.core.files import read_text
from lscollapse.core.outside import checked, shown, unwritten
from lscollapse.core.table import DEFAULT_MEASURES, RESOLVE, chosen_measures
from lscollapse.core.yaml_text import LARGEST_YAML, parse_yaml

EMBEDDED_MODELS = ["mamba2-tiny", "minilm-l6", "albert-smiles"]
DEFAULT_LAMBDAS = [-8.0, -4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0, 8.0]
CC_BY_SA = "CC BY-SA 4.0"
LARGEST_FLOAT32 = 3.4028234e38
DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")

Seed = Annotated[int, Field(ge=0, lt=2**63)]
Count = Annotated[int, Field(ge=1, le=10**9)]  # of steps, epochs, examples: more than can be done
Layers = Annotated[int, Field(ge=1, le=1000)]
Width = Annotated[int, Field(ge=1, le=2**17)]  # a square matrix of it takes 64 GiB in float32
Lambda32 = Annotated[float, Field(ge=-LARGEST_FLOAT32, le=LARGEST_FLOAT32)]  # of a net that is trained, in float32


class ConfigError(ValueError):
    """A configuration has an unknown key or a value that is not allowed."""


class Section(BaseModel):
    """Part of a configuration; it refuses keys that it does not know and names the nearest. Every number in it is finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

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

    @field_validator("*")
    @classmethod
    def _written_out(cls, value: Any) -> Any:
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str | Path) and (found := unwritten(str(text))):
                raise ValueError(f"{shown(found)} is no character that can be printed: leave it out")
        return value


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
    max_retries: int = Field(default=5, ge=0, le=100)
    retry_wait: float = Field(default=1.0, ge=0, le=86400)
    licence: str = CC_BY_SA


class S4DTraining(Section):
    """How an S4D is trained; the defaults make s4d-digits. `model` has fields of S4DConfig that do not follow from the data."""

    data: str = "digits"
    epochs: Count = 16
    batch: Count = 24
    lr: float = Field(default=2e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup: float = Field(default=0.1, ge=0, le=1)
    seed: Seed = 0
    save_every: Count = 30
    crops: bool = False  # random crops and flips, for square images
    model: dict[str, bool | int | float | str] = Field(default={})


class Compute(Section):
    """What computes the rows: device, processes or cluster. It decides none of them."""

    device: str = Field(default="auto", description="auto, cpu or cuda.")
    engine: Literal["local", "ray"] = Field(
        default="local", description="local, or ray: work items as tasks of a Ray cluster."
    )
    address: str | None = Field(
        default=None, description="Of a Ray cluster: auto or HOST:PORT; by default one is started here."
    )
    gpus_per_item: float | None = Field(
        default=None, gt=0, le=1024, description="GPUs of a Ray cluster that a work item takes."
    )
    workers: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Processes on this machine; by default one for each GPU, else one; of `table1` one for each core, or one on a GPU.",
    )

    @field_validator("device")
    @classmethod
    def _a_device(cls, name: str) -> str:
        if not DEVICE.fullmatch(name):
            raise ValueError(f"'{shown(name)}' is not known: use auto, cpu, cuda or cuda:N")
        return name


class Experiment(Compute):
    """Everything that decides the rows of a run, and what computes them."""

    models: list[str] = Field(
        default=EMBEDDED_MODELS,
        min_length=1,
        description="Short name, folder, GGUF file or hub id; repeat for several.",
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of a model of the hub.")
    lambdas: list[float] = Field(
        default=DEFAULT_LAMBDAS, min_length=1, max_length=10_000, description='Comma-separated, such as "-2,0,0.5,1".'
    )
    lambdas_file: Path | None = Field(
        default=None, description="CSV layer,lam: one lambda per layer, measured beside the others."
    )
    excerpts: int = Field(default=32, ge=1, le=10**6, description="How many excerpts, or held-out images.")
    tokens: int = Field(default=128, ge=2, le=10**6, description="Tokens of each excerpt.")
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
    seed: Seed = Field(default=0, description="Which excerpts are drawn, and random initial weights.")
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
    def _distinct(cls, values: list[float]) -> list[float]:
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
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([kmgt]?)(?:i?b)?\s*", text, re.IGNORECASE)
    return int(float(found[1]) * 2 ** (10 * "_kmgt".find(found[2].lower() or "_"))) if found else 0


def configure(
    schema: type[Schema],
    file: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    settings: list[str] | None = None,
) -> Schema:
    """What a YAML file says of `schema`, overridden by flags (None = not given), then by `key=value` settings.

    Args:
        flags: by key, `section.key` where it is one of a section.

    Raises:
        ConfigError: one line: what came, what is allowed.
    """
    values: dict[str, Any] = {}
    if file is not None:
        values = _read_yaml(file)
    for key, value in (flags or {}).items():
        if value is not None:
            _put(values, key, value)
    for setting in settings or []:
        key, separator, text = setting.partition("=")
        if not separator:
            raise ConfigError(f"--set takes key=value, got '{shown(setting)}'")
        _put(values, key.strip(), parse_yaml(text, f"--set {shown(setting)}", ConfigError))
    return checked(schema, values, ConfigError)


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set `section.key`, with the sections that are not there yet."""
    *parents, leaf = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {shown(key)}: {shown(parent)} is not a section")
    values[leaf] = value


def shipped(name: str) -> Path:
    """A file of configs/: in the installed package, or beside it in a checkout."""
    here = Path(__file__).parents[1]
    return next(root / "configs" / name for root in (here, here.parent) if (root / "configs" / name).is_file())


def parse_lambdas(text: str) -> list[float]:
    """A comma-separated list such as "-2,0,0.5" as numbers."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--lambdas takes numbers separated by commas, such as -2,0,0.5,1; got '{shown(text)}'"
        ) from None


def _read_yaml(file: Path) -> dict[str, Any]:
    if not os.path.lexists(file):
        raise ConfigError(f"no configuration file {shown(str(file), 200)}")
    values = parse_yaml(read_text(file, ConfigError, LARGEST_YAML), str(file), ConfigError)
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must hold `key: value` lines")
    return values
