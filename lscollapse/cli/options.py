"""The options of the verbs: name, type, default and help are made here, from the fields of the configuration."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lscollapse.core.config import ConfigError, Experiment, Section, WikipediaSection, configure, parse_lambdas, shipped

Model = Annotated[str, typer.Argument(help="Short name, folder, GGUF file or hub id.")]
Models = Annotated[list[str] | None, typer.Option("--model", help=Experiment.model_fields["models"].description)]
Out = Annotated[Path | None, typer.Option(help="Run folder.  \\[default: runs/VERB]")]
Shown = Annotated[
    Literal["relative_mu", "angular_mu"],
    typer.Option(help="What Figures 1 and 3 show: relative_mu is the paper's; angular_mu, which no long row decides, has files of its own."),
]  # fmt: skip
Edited = Annotated[
    bool,
    typer.Option("--no-verify", help="Read tables that were edited after their run too; what is made of them says so."),
]
Yscale = Annotated[Literal["linear", "log"], typer.Option(help="linear or log vertical axis.")]
FILE = "YAML file as in configs, of `table1` and `train` as in configs/table1; flags override it.  \\[default: the embedded one]"
SHARED: dict[str, Any] = {
    "model": Model,
    "models": Models,
    "config": Annotated[Path | None, typer.Option(help=FILE)],
    "titles": Annotated[Path | None, typer.Option(help=WikipediaSection.model_fields["titles"].description)],
    "settings": Annotated[
        list[str] | None, typer.Option("--set", help="key=value, any setting of the configuration; repeat for several.")
    ],
}
EXPERIMENT = f"{Experiment.__module__}:{Experiment.__name__}"


def within(least: float, most: float) -> Callable[[typer.CallbackParam, Any], Any]:
    """What refuses a number outside [least, most] of an option that is no setting: its `callback`."""

    def refuse(option: typer.CallbackParam, value: Any) -> Any:
        if value is not None and not least <= value <= most:
            raise ConfigError(f"{option.opts[0]} {value}: give a number from {least:,} to {most:,}")
        return value

    return refuse


def takes(
    *names: str, schema: str = EXPERIMENT, file: str | None = None, **defaults: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A verb's options, in this order; it is called with the configuration that they make, and with its own parameters.

    Args:
        names: fields of the configuration, keys of SHARED, and parameters of the verb itself, where these stand among
            the others; the rest of them come last.
        schema: "module:Class" of the configuration, imported when the verb runs; its options are described by Experiment.
        file: the file of configs/ that is read where --config is not given.
        defaults: of fields that have another one in this verb.
    """

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        kind = schema.partition(":")[2]
        # The schema may not be imported yet, so its name stands for any section.
        _, *rest = inspect.signature(verb, locals={kind: Section}, eval_str=True).parameters.values()
        own = {parameter.name: parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in rest}
        options = [own[name] if name in own else _option(name, defaults.get(name)) for name in names]
        options += [parameter for name, parameter in own.items() if name not in names]

        @wraps(verb)
        def called(**given: Any) -> None:
            values = {option.name: option.default for option in options} | given
            verb(_configuration(schema, file, values), **{name: values[name] for name in own})

        called.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]  # what Typer reads
        called.__annotations__ = {}
        return called

    return decorate


def _option(name: str, default: Any) -> Parameter:
    """The option of a field; not given it is None, which leaves the setting to the file or its default."""
    if name in SHARED:  # `models` are those of the option --model, `model` is an argument, which must be given
        default = Parameter.empty if name == "model" else None
        return Parameter(
            name.replace("models", "model"), Parameter.KEYWORD_ONLY, default=default, annotation=SHARED[name]
        )
    field = Experiment.model_fields[name]
    kinds = (bool, int, float, Path)  # all others are text, so that the schema says what is wrong with it
    kind: Any = next((kind for kind in kinds if field.annotation in (kind, kind | None)), str)
    text, flag = field.description or "", f"--{name.replace('_', '-')}"
    if kind is bool:
        flag += "" if field.default is False else f"/--no-{flag[2:]}"
    elif default is None and isinstance(field.default, str | int):
        text += f"  \\[default: {field.default}]"
    annotation = Annotated[kind | None, typer.Option(flag, help=text)]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _configuration(schema: str, file: str | None, given: dict[str, Any]) -> Section:
    """A configuration file, flags over it, `--set` over these; a flag `mixer` is the one of `mixers`."""
    module, _, kind = schema.partition(":")
    described: type[Section] = getattr(import_module(module), kind)
    flags = {name: value for name, value in given.items() if name in described.model_fields}
    for name, value in given.items():
        if f"{name}s" in described.model_fields and value is not None and value != []:
            flags[f"{name}s"] = value if isinstance(value, list) else [value]
    if flags.get("lambdas") is not None:
        flags["lambdas"] = parse_lambdas(flags["lambdas"])
    if given.get("titles") is not None:
        flags["wikipedia.titles"] = given["titles"]
    path = given.get("config") or (shipped(file) if file else None)
    return configure(described, path, flags, given.get("settings"))
