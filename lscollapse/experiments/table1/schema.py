"""The schema of configs/table1/*.yaml: which nets are trained, how and how often, and on what; a task draws its data."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from lscollapse.core.config import Compute, Count, Lambda32, Section, Seed
from lscollapse.core.table import MARGIN
from lscollapse.data import images, mqar
from lscollapse.data.examples import Examples, Split
from lscollapse.models.nets.lambda_net import Mixer, NetSection
from lscollapse.runs.training import Optimisation

LamMode = Lambda32 | Literal["learnable"]
Rate = Annotated[float, Field(gt=0)]  # at 0 nothing is learnt
Examined = Annotated[int, Field(ge=1, le=10**7)]  # sequences of a split, which are drawn into memory
MOST_TOKENS = 2**32  # of a split
RECIPE = ("net", "training", "lrs")  # what `per_mixer` can change


class TrainingSection(Optimisation):
    """How the nets of a task are trained: for `steps` where they are given, else for `epochs`."""

    epochs: float = Field(default=64.0, gt=0, le=10**6)
    steps: Count | None = None


class Override(Section):
    """What the verb `train` says of its one cell in place of the configuration."""

    lr: Rate | None = None
    steps: Count | None = None


class MqarData(mqar.MqarConfig):
    """The task, how many sequences each split has, and the seed that they are drawn from."""

    train: Examined = 100_000
    validation: Examined = 3000
    test: Examined = 3000
    seed: Seed = 0

    @model_validator(mode="after")
    def _in_memory(self) -> MqarData:
        drawn = max(self.train, self.validation, self.test)
        if drawn * self.seq_len > MOST_TOKENS:
            raise ValueError(
                f"{drawn:,} sequences of {self.seq_len:,} tokens are drawn into memory and need"
                f" {2 * drawn * self.seq_len / 2**30:,.0f} GiB or more: at most {MOST_TOKENS:,} tokens are"
            )
        return self

    def examples(self, split: Split) -> Examples:
        """The examples of a split."""
        return mqar.sequences(self, split, getattr(self, split), self.seed)

    def training(self) -> tuple[Examples, str, dict[str, Any]]:
        """The examples to train on, their source in words, and the fields of a NetConfig that they decide."""
        V = self.vocab_size
        source = f"MQAR, L = {self.seq_len}, {self.pairs} pairs, vocabulary {V}, data seed {self.seed}"
        return self.examples("train"), source, {"reads": "tokens", "output": "each", "vocab_size": V, "n_labels": V}


class ImageData(Section):
    """`source` is digits, cifar10 or a folder, as `data.images.grey` takes it."""

    source: str = "digits"
    seed: Seed = 0

    def examples(self, split: Split) -> Examples:
        """The examples of a split."""
        found = images.grey(self.source, split, self.seed)
        return Examples(found.ids, found.labels)

    def training(self) -> tuple[Examples, str, dict[str, Any]]:
        """The examples to train on, their source in words, and the fields of a NetConfig that they decide; read once."""
        found = images.grey(self.source, "train", self.seed)
        net = {"reads": "pixels", "output": "pooled", "vocab_size": found.levels, "n_labels": found.n_labels}
        return Examples(found.ids, found.labels), f"{found.source}, grey, {found.ids.shape[1]} pixels", net


TaskData = MqarData | ImageData


class Recipe(Section):
    """A net's shape, its training and the learning rates that validation chooses from."""

    net: NetSection = NetSection()
    training: TrainingSection = TrainingSection()
    lrs: list[Rate] = Field(min_length=1, max_length=1000)

    @field_validator("lrs")
    @classmethod
    def _distinct(cls, values: list[float]) -> list[float]:
        if len(set(values)) != len(values):
            raise ValueError("a learning rate is given twice")
        return sorted(values)


class TaskSection(Recipe):
    """A recipe, and in `per_mixer` what differs from it for some mixers."""

    per_mixer: dict[Mixer, Recipe] = Field(default={})

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        """Each entry of `per_mixer` is laid over the task's recipe."""
        if not isinstance(values, dict) or not isinstance(values.get("per_mixer"), dict):
            return values
        common = {key: values[key] for key in RECIPE if key in values}
        return {**values, "per_mixer": {mixer: _over(common, own) for mixer, own in values["per_mixer"].items()}}

    def recipe(self, mixer: Mixer) -> Recipe:
        return self.per_mixer.get(mixer, self)


class MqarSection(TaskSection):
    data: MqarData = MqarData()


class ImageSection(TaskSection):
    data: ImageData = ImageData()


class Table1(Compute):
    """Everything that decides the rows of Table 1, and by what they are computed; a GPU of a Ray cluster is used if asked for.

    Attributes:
        lams: lambda modes: numbers, fixed for all layers, and `learnable`.
        lam_inits: where a learnable lambda starts; each is a mode of its own.
        measured: held-out inputs on which relative mu is measured before and after training.
        margin: points of test accuracy (of 1) under which a loss does not count: see `reports.table1`.
    """

    mixers: list[Mixer] = Field(default=list(get_args(Mixer)), min_length=1)
    lams: list[LamMode] = Field(default=[1.0, "learnable"], min_length=1, max_length=1000)
    lam_inits: list[Lambda32] = Field(default=[-1.0], min_length=1, max_length=1000)
    seeds: list[Seed] = Field(default=[0, 1, 2], min_length=1, max_length=1000)
    mqar: MqarSection | None = None
    image: ImageSection | None = None
    measured: Count = 8
    margin: float = Field(default=MARGIN, gt=0, le=1)
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description=Compute.model_fields["device"].description
    )
    tensorboard: bool = True

    @model_validator(mode="after")
    def _some_task(self) -> Table1:
        if not self.tasks:
            raise ValueError("no task: give a section mqar or image")
        return self

    @property
    def tasks(self) -> dict[str, MqarSection | ImageSection]:
        return {name: task for name, task in (("mqar", self.mqar), ("image", self.image)) if task is not None}


def _over(common: Any, own: Any) -> Any:
    """`own` over `common`, section by section."""
    if not (isinstance(common, dict) and isinstance(own, dict)):
        return own
    return {**common, **{key: _over(common.get(key), value) for key, value in own.items()}}
