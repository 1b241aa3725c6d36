"""The schema of configs/table1/*.yaml: which nets are trained on which task, how, and how often."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any, Literal, get_type_hints

from pydantic import Field, create_model, field_validator, model_validator

from lscollapse.core.config import Section
from lscollapse.core.table import MARGIN
from lscollapse.data.mqar import MqarConfig
from lscollapse.models.nets.lambda_net import NetConfig
from lscollapse.runs.training import Settings

Mixer = Literal["attention", "linear", "mamba", "mamba2"]
TaskName = Literal["mqar", "image"]
LamMode = float | Literal["learnable"]
RECIPE = ("net", "training", "lrs")  # what `per_mixer` can change


def _section_of(kind: type, *without: str, **more: Any) -> Any:
    """A section with the fields and defaults of a dataclass, but for some, and with `more`."""
    hints = get_type_hints(kind)
    chosen = [field for field in fields(kind) if field.name not in without]
    own: dict[str, Any] = {
        field.name: (hints[field.name], ... if field.default is MISSING else field.default) for field in chosen
    }
    return create_model(kind.__name__ + "Section", __base__=Section, **own, **more)


# The rest of a NetConfig follows from the task and the cell.
NetSection = _section_of(
    NetConfig, "mixer", "vocab_size", "n_labels", "reads", "output", "max_positions", "lam", "lam_init"
)
TrainingSection = _section_of(
    Settings, "steps", "lr", "seed", epochs=(float, Field(default=64.0, gt=0)), steps=(int | None, None)
)
MqarData = _section_of(
    MqarConfig,
    train=(int, Field(default=100_000, ge=1)),
    validation=(int, Field(default=3000, ge=1)),
    test=(int, Field(default=3000, ge=1)),
    seed=(int, Field(default=0, ge=0)),
)
SECTIONS = {"net": NetSection, "training": TrainingSection}


class ImageData(Section):
    """`source` is digits, cifar10 or a folder, as `data.images.grey` takes it."""

    source: str = "digits"
    seed: int = Field(default=0, ge=0)


class Recipe(Section):
    """A net's shape, its training (`steps`, or else `epochs`) and the learning rates that validation chooses from."""

    net: Any = Field(default={})
    training: Any = Field(default={})
    lrs: list[float] = Field(min_length=1)

    @field_validator("net", "training", mode="before")
    @classmethod
    def _sections(cls, value: Any, info: Any) -> Any:
        return SECTIONS[info.field_name].model_validate(value)

    @field_validator("lrs")
    @classmethod
    def _distinct(cls, values: list[float]) -> list[float]:
        if min(values) <= 0 or len(set(values)) != len(values):
            raise ValueError("learning rates must be positive, each given once")
        return sorted(values)


class TaskSection(Recipe):
    """A recipe, and for some mixers what differs from it."""

    per_mixer: dict[Mixer, Recipe] = Field(default={})

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        """Each entry of `per_mixer` is laid over the task's recipe."""
        if not isinstance(values, dict) or not isinstance(values.get("per_mixer"), dict):
            return values
        common = {key: values[key] for key in RECIPE if key in values}
        return {**values, "per_mixer": {mixer: _over(common, own) for mixer, own in values["per_mixer"].items()}}

    def recipe(self, mixer: str) -> Recipe:
        return self.per_mixer.get(mixer, self)  # type: ignore[call-overload]


class MqarSection(TaskSection):
    data: Any = Field(default={})

    @field_validator("data", mode="before")
    @classmethod
    def _section(cls, value: Any) -> Any:
        return MqarData.model_validate(value)


class ImageSection(TaskSection):
    data: ImageData = ImageData()


class Table1(Section):
    """Everything that decides the rows of Table 1, and by what they are computed.

    Attributes:
        lams: lambda modes: numbers, fixed for all layers, and `learnable`.
        lam_inits: where a learnable lambda starts; each is a mode of its own.
        measured: held-out inputs on which relative mu is measured before and after training.
        margin: points of test accuracy (of 1) under which a loss does not count: see `table1_claims`.
        workers: processes on this machine; None: one for each core, or one where a GPU computes.
        engine, address, gpus_per_item: as an Experiment has them; a GPU of a Ray cluster is used if asked for.
    """

    mixers: list[Mixer] = Field(default=["attention", "linear", "mamba", "mamba2"], min_length=1)
    lams: list[LamMode] = Field(default=[1.0, "learnable"], min_length=1)
    lam_inits: list[float] = Field(default=[-1.0], min_length=1)
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1)
    mqar: MqarSection | None = None
    image: ImageSection | None = None
    measured: int = Field(default=8, ge=1)
    margin: float = Field(default=MARGIN, gt=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: int | None = Field(default=None, ge=1)
    engine: Literal["local", "ray"] = "local"
    address: str | None = None
    gpus_per_item: float | None = Field(default=None, gt=0)
    tensorboard: bool = True

    @model_validator(mode="after")
    def _some_task(self) -> Table1:
        if not self.tasks:
            raise ValueError("no task: give a section mqar or image")
        return self

    @property
    def tasks(self) -> dict[str, TaskSection]:
        return {name: task for name, task in (("mqar", self.mqar), ("image", self.image)) if task is not None}


def _over(common: Any, own: Any) -> Any:
    """`own` over `common`, section by section."""
    if not (isinstance(common, dict) and isinstance(own, dict)):
        return own
    return {**common, **{key: _over(common.get(key), value) for key, value in own.items()}}
