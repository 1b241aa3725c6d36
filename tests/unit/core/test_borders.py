"""What a person writes for a machine to read: YAML and values that no configuration means are one short line."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest

from lscollapse.core import files
from lscollapse.core.config import ConfigError, Experiment, configure, parse_lambdas, parse_memory
from lscollapse.core.files import cache_folder, read_mapping, read_text, refuse_pipes
from lscollapse.core.outside import LONGEST, one_line, plain, unwritten
from lscollapse.core.yaml_text import LARGEST_YAML
from lscollapse.experiments.table1.schema import Override, Table1

load = partial(configure, Experiment)
LEVELS = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 9)]
MERGED = [f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}" for n in range(1, 30)]


def refusal(text: str | bytes, folder: Path, schema: type[Experiment | Table1] = Experiment) -> str:
    file = folder / "a.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    with pytest.raises(ConfigError) as caught:
        configure(schema, file)
    message = str(caught.value)
    assert "\n" not in message and len(message) <= LONGEST + 100 and plain(message) == message
    return message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("source: " + "{a: " * 20_000, "values inside values without end"),
        (
            "\n".join(["l0: &l0 [x, x]", *LEVELS, "models: *l8"]),
            "values, its aliases written out; at most 100,000 are read",
        ),
        ("\n".join(["l0: &l0 [x, x]", *LEVELS[:3], "models: *l3"]), "unknown setting 'l0'"),
        ("retrain: {epochs: &a [*a]}", "values inside values without end"),
        (
            "models: [" + "x, " * 5_000 + "{a: 1}]",
            "models.5000: input should be a valid string, got a mapping of 1 keys",
        ),
        ("\n".join(["m0: &m0 {a: 1, b: 2}", *MERGED]), "unknown setting 'm0'"),
        ("source: 2001-99-99", "holds a date, a number or a tag that means nothing: month must be in 1..12"),
        ("source: !!timestamp x", "holds a date, a number or a tag that means nothing"),
        ("tokens: !!int x", "holds a date, a number or a tag that means nothing"),
        ("tokens: " + "9" * 5000, "holds a date, a number or a tag that means nothing: Exceeds the limit"),
        ("? {a: 1}\n: 2", "is not YAML"),
        ("!!python/object:os.system {}", "is not YAML"),
        ("a: !!binary é", "is not YAML"),
        ('source: "half \\ud83d"', r"is half of a character"),
        ('models: ["a\\x1b[31m"]', r"models: \x1b is no character that can be printed"),
        ('wikipedia: {contact: "two\\nlines"}', r"wikipedia.contact: \n is no character that can be printed"),
        (b"\x00\x01\x02PAR1", "is not YAML"),
        (b"\xff\xfe", "is not UTF-8 text (byte 0)"),
        ("#" * (LARGEST_YAML + 1), "is 131,073 bytes, at most 131,072 are read"),
        ("lambdas: [1e400]", "lambdas.0: input should be a finite number"),
        (f"lambdas: [1{'0' * 400}]", "lambdas.0: "),
        ("lambdas: [.inf]", "lambdas.0: input should be a finite number, got inf"),
        ("resolve: .nan", "resolve: input should be"),
        (f"seed: {2**63}", "seed: input should be less than 9223372036854775808"),
        (f"excerpts: {10**9}", "excerpts: input should be less than or equal to 1000000"),
        (f"tokens: {10**9}", "tokens: input should be less than or equal to 1000000"),
        ("workers: 100000", "workers: input should be less than or equal to 1024"),
        ("wikipedia: {retry_wait: .inf}", "wikipedia.retry_wait: input should be a finite number"),
        ("wikipedia: {retry_wait: 1e9}", "wikipedia.retry_wait: input should be less than or equal to 86400"),
        ("wikipedia: {max_retries: 1000000}", "wikipedia.max_retries: "),
        ("retrain: {lr: .inf}", "retrain.lr: input should be a finite number"),
        ("retrain: {weight_decay: .nan}", "retrain.weight_decay: input should be a finite number"),
        ("device: tpu", "device: 'tpu' is not known: use auto, cpu, cuda or cuda:N"),
        ("max_memory: " + "9" * 400 + "T", "max_memory is a size such as 2GiB"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_yaml_that_no_configuration_means(tmp_path: Path, text: str | bytes, says: str) -> None:
    assert says in refusal(text, tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("mqar: {lrs: [.inf]}", "mqar.lrs.0: input should be a finite number"),
        ("mqar: {lrs: [0]}", "mqar.lrs.0: input should be greater than 0"),
        ("mqar: {lrs: [0.1], training: {steps: 0}}", "mqar.training.steps: input should be greater than or equal to 1"),
        ("mqar: {lrs: [0.1], training: {betas: [1.0, 0.9]}}", "mqar.training.betas.0: input should be less than 1"),
        ("mqar: {lrs: [0.1], training: {clip: -1}}", "mqar.training.clip: input should be greater than 0"),
        (
            "mqar: {lrs: [0.1], net: {hidden_size: 10000000}}",
            "mqar.net.hidden_size: input should be less than or equal",
        ),
        ("mqar: {lrs: [0.1], net: {num_hidden_layers: 10000000}}", "mqar.net.num_hidden_layers: input should be less"),
        (
            "mqar: {lrs: [0.1], data: {train: 10000000, seq_len: 1048576}}",
            "need 19,531 GiB or more: at most 4,294,967,296",
        ),
        ("mqar: {lrs: [0.1], data: {train: 10000000000}}", "mqar.data.train: input should be less than or equal"),
        ("{mqar: {lrs: [0.1]}, seeds: [-1]}", "seeds.0: input should be greater than or equal to 0"),
        ("{mqar: {lrs: [0.1]}, lams: [1e39]}", "lams.0"),
        (
            "{mqar: {lrs: [0.1]}, lam_inits: [-1.0e+39]}",
            "lam_inits.0: input should be greater than or equal to -34028234",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_grid_that_cannot_be_trained(tmp_path: Path, text: str, says: str) -> None:
    assert says in refusal(text, tmp_path, Table1)


def test_the_bounds_themselves_are_allowed() -> None:
    assert load(settings=[f"seed={2**63 - 1}"]).seed == 2**63 - 1
    assert load(settings=["lambdas=[1.0e+300, -1.0e-300]"]).lambdas == [-1e-300, 1e300]
    assert load(settings=["device=cuda:7"]).device == "cuda:7"
    assert Override(lr=1e30, steps=1) == Override.model_validate({"lr": 1e30, "steps": 1})
    assert parse_memory("1.5GiB") == 3 * 2**29
    assert load(flags={"wikipedia.titles": Path("my #1: a.txt")}).wikipedia.titles == Path("my #1: a.txt")


def test_anchors_are_read_where_they_stand_for_little(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("retrain: &r {epochs: 2}\nmodels: &m [a, b]\n")
    assert load(file).models == ["a", "b"]


@pytest.mark.parametrize("setting", ["tokens=" + "{a: " * 20_000, "source=2001-99-99", "lambdas=!!timestamp x"])
def test_settings_are_refused_as_files_are(setting: str) -> None:
    with pytest.raises(ConfigError, match=r"^--set ") as caught:
        load(settings=[setting])
    assert len(str(caught.value)) < LONGEST


def test_long_lists_of_lambdas_are_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_lambdas("1," * 100_000)
    assert len(str(caught.value)) < LONGEST
    with pytest.raises(ConfigError, match="finite"):
        load(flags={"lambdas": parse_lambdas("1e400")})


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    """Opening a pipe to read it would wait for ever."""
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero"), tmp_path):
        with pytest.raises(ConfigError, match="cannot be read: it is a "):
            read_text(path, ConfigError)
    with pytest.raises(ConfigError, match="it is a "):
        load(pipe)
    with pytest.raises(ConfigError, match=r"pipe\.yaml is a pipe or a device"):
        refuse_pipes(tmp_path, ConfigError)
    with pytest.raises(ConfigError, match="no configuration file"):
        load(Path("x" * 300))


def test_a_json_file_holds_an_object_within_bounds(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    for text, says in (
        ("[" * 200_000, "values inside values without end"),
        ('{"a": ' * 100 + "1" + "}" * 100, "values inside values without end, where 64 levels are read"),
        ("[1, 2]", r"holds no JSON object \(\{...\}\) but \[1, 2\]"),
        ('{"a": "\\udc00"}', "is half of a character"),
        ("1" * 5000, "not JSON"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=says):
            read_mapping(file, ConfigError)
    with pytest.raises(ConfigError, match="at most 4 are read"):
        read_mapping(file, ConfigError, 4)


def test_no_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LSCOLLAPSE_CACHE", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # where HOME is not set and the system names none
    with pytest.raises(ValueError, match="no home folder is known"):
        cache_folder(None)
    assert cache_folder(tmp_path) == tmp_path
    assert files.expanded("~/a") == Path("~/a")


def test_what_a_terminal_obeys_is_shown() -> None:
    assert plain("a\x1b[2Jb\u202ec\ud83d") == r"a\x1b[2Jb\u202ec\ud83d"
    assert [unwritten(text) for text in ("é　", "a\x9b", "\ud83d", "a\x00")] == ["", "\x9b", "\ud83d", "\x00"]
    assert one_line("a\nb\x07") == r"a b\x07"
