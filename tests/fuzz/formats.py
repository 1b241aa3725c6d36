"""The formats that are read from outside: a valid document of each, and the verb that reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.fuzz import given
from tests.fuzz.given import FEW, as_parquet, as_safetensors, copied, folder
from tests.fuzz.mutations import as_json, as_lines, as_text

Arguments = list[str | Path]
OUT = ("out", "cache")  # where a verb may write


@dataclass(frozen=True)
class Format:
    """A format of input.

    Attributes:
        document: makes a valid one, as JSON values.
        dump: the bytes that such a value is in a file.
        given: (empty folder, bytes) -> the verb that reads them, with what it is given beside them written there.
        around: what the verb runs in, for that folder.
        slow: left to `make fuzz`, since another verb reads the format too.
    """

    document: Callable[[], Any]
    dump: Callable[[Any], bytes]
    given: Callable[[Path, bytes], Arguments]
    around: Callable[[Path], AbstractContextManager[None]] = nullcontext
    slow: bool = False


def _file(name: str, *, of: str = "model") -> Callable[[Path, bytes], Arguments]:
    """A malformed file of a model folder."""

    def given(root: Path, data: bytes) -> Arguments:
        model = copied(of, root)
        (model / name).write_bytes(data)
        return ["check-identity", model, *FEW, "--source", folder() / "text.txt", "--tokenizer", "native"]

    return given


def _source(ending: str, *options: str) -> Callable[[Path, bytes], Arguments]:
    def given(root: Path, data: bytes) -> Arguments:
        (root / f"text{ending}").write_bytes(data)
        tokenizer = ["--tokenizer", folder() / "model", *options]
        return ["excerpts", root / "out", *FEW, "--source", root / f"text{ending}", *tokenizer]

    return given


def _frozen(root: Path, data: bytes) -> Arguments:
    (root / "frozen.jsonl").write_bytes(data)
    return ["check-identity", folder() / "model", *FEW, "--source", root / "frozen.jsonl", "--tokenizer", "native"]


def _config(root: Path, data: bytes) -> Arguments:
    (root / "config.yaml").write_bytes(data)
    return ["excerpts", root / "out", "--config", root / "config.yaml", "--source", folder() / "text.txt", *FEW]


def _lambdas(root: Path, data: bytes) -> Arguments:
    (root / "lambdas.csv").write_bytes(data)
    given = ["--source", folder() / "frozen.jsonl", "--lambdas-file", root / "lambdas.csv", "--out", root / "out"]
    return ["measure", folder() / "mamba2", *FEW, *given]


def _run_file(name: str, *verb: str) -> Callable[[Path, bytes], Arguments]:
    """A malformed file of a finished run."""

    def given(root: Path, data: bytes) -> Arguments:
        run = copied("finished", root)
        (run / name).write_bytes(data)
        if verb[0] == "compare":
            return ["compare", "--no-verify", run, folder() / "finished"]
        return [*verb, run, *(["-o", root / "out"] if verb[0] == "report" else [])]

    return given


def _titles(root: Path, data: bytes) -> Arguments:
    (root / "titles.txt").write_bytes(data)
    given.answers().answer = as_json(_article())
    return _wikipedia(root, root / "titles.txt")


def _answer(root: Path, data: bytes) -> Arguments:
    (root / "titles.txt").write_text("Bees\nAnts\n")
    given.answers().answer = data
    return _wikipedia(root, root / "titles.txt")


def _drawn(root: Path, data: bytes) -> Arguments:
    given.answers().random, given.answers().answer = data, as_json(_article())
    return _wikipedia(root)


def _wikipedia(root: Path, titles: Path | None = None) -> Arguments:
    wiki = {
        "endpoint": f"{given.answers().url}/api.php",
        "max_retries": 0,
        "retry_wait": 0,
        "cache_dir": root / "cache",
    }
    settings = [part for name, value in wiki.items() for part in ("--set", f"wikipedia.{name}={value}")]
    chosen = ["--titles", titles] if titles else []
    one = ["--excerpts", "1", "--tokens", "8", "--tokenizer", "smiles"]  # quickly loaded
    return ["excerpts", root / "out", *one, "--source", "wikipedia", *chosen, *settings]


def _listed(_root: Path, data: bytes) -> Arguments:
    def answered(_info: Any) -> Any:
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            return data.decode(errors="replace")

    given.hub().faults.edit = answered
    return ["fetch", "tiny/bert"]


def _listing() -> Any:
    found: list[Any] = []

    def kept(info: Any) -> Any:
        found.append(info)
        return info

    with TemporaryDirectory() as root, given.on_the_hub(Path(root)):
        given.hub().faults.edit = kept
        given.must("fetch", "tiny/bert")
    return found[0]


def _article() -> dict[str, Any]:
    page = {
        "pageid": 7, "ns": 0, "title": "Bees", "extract": "CC(=O)NCCOCCNC(C)CO", "lastrevid": 12, "length": 5,
        "fullurl": "https://en.wikipedia.org/wiki/Bees", "canonicalurl": "https://en.wikipedia.org/wiki/Bees",
        "touched": "2024-01-01T00:00:00Z", "contentmodel": "wikitext", "pagelanguage": "en",
    }  # fmt: skip
    return {"batchcomplete": "", "query": {"normalized": [{"from": "bees", "to": "Bees"}], "pages": {"7": page}}}


def _random() -> dict[str, Any]:
    found = [{"id": n, "ns": 0, "title": title} for n, title in enumerate(("Bees", "Ants"), 1)]
    return {
        "batchcomplete": "",
        "continue": {"rncontinue": "0.1|0.2|3|0", "continue": "-||"},
        "query": {"random": found},
    }


def _json_of(*parts: str) -> Callable[[], Any]:
    return lambda: json.loads(folder().joinpath(*parts).read_text())


def _lines_of(name: str) -> Callable[[], Any]:
    return lambda: [json.loads(line) for line in (folder() / name).read_text().splitlines()]


def _settings() -> dict[str, Any]:
    return {
        "models": ["x"], "lambdas": [0.0, 1.0], "excerpts": 2, "tokens": 8, "seed": 0, "tokenizer": str(folder() / "model"),
        "measures": ["relative_mu"], "dtype": "auto", "max_memory": "2GiB", "resolve": 0.001, "device": "cpu",
        "wikipedia": {"language": "en", "max_retries": 3, "retry_wait": 1.0}, "retrain": {"epochs": 4, "lr": 0.001},
    }  # fmt: skip


def _finished(name: str) -> Callable[[], Any]:
    return lambda: given.columns(folder() / "finished" / name)


FORMATS: dict[str, Format] = {
    "configuration": Format(_settings, as_json, _config),
    "config.json of BERT": Format(_json_of("model", "config.json"), as_json, _file("config.json")),
    "config.json of Mamba-2": Format(_json_of("mamba2", "config.json"), as_json, _file("config.json", of="mamba2")),
    "vocabulary": Format(lambda: list(given.WORDS), as_text, _file("vocab.txt")),
    "tokenizer settings": Format(
        _json_of("model", "tokenizer_config.json"), as_json, _file("tokenizer_config.json")
    ),
    "weights index": Format(
        _json_of("sharded", "model.safetensors.index.json"), as_json, _file("model.safetensors.index.json", of="sharded")
    ),
    "weights header": Format(
        lambda: given.header(folder() / "model" / "model.safetensors")[0], as_safetensors, _file("model.safetensors")
    ),
    "text": Format(lambda: given.TEXT.split("\n"), as_text, _source(".txt")),
    "text, JSONL": Format(
        lambda: [{"text": block, "title": f"t{n}", "url": "u"} for n, block in enumerate(given.TEXT.split("\n\n"))],
        as_lines, _source(".jsonl"),
    ),
    "text, Parquet": Format(
        lambda: {"id": ["1", "2", "3"], "title": list("abc"), "text": given.TEXT.split("\n\n")}, as_parquet, _source(".parquet")
    ),
    "frozen excerpts": Format(_lines_of("frozen.jsonl"), as_lines, _frozen),
    "lambdas by layer": Format(lambda: ["layer,lam", "1,0.5", "2,1.5"], as_text, _lambdas),
    "titles": Format(lambda: ["Bees", "Ants"], as_text, _titles),
    "wiki's article": Format(_article, as_json, _answer),
    "wiki's draw": Format(_random, as_json, _drawn),
    "hub's listing": Format(_listing, as_json, _listed, given.on_the_hub),
    "manifest, claims": Format(_json_of("finished", "manifest.json"), as_json, _run_file("manifest.json", "claims", "--format", "json")),
    "manifest, report": Format(_json_of("finished", "manifest.json"), as_json, _run_file("manifest.json", "report"), slow=True),
    "rows, claims": Format(
        _finished("rows.parquet"), as_parquet, _run_file("rows.parquet", "claims", "--no-verify", "--format", "json")
    ),
    "rows, compare": Format(_finished("rows.parquet"), as_parquet, _run_file("rows.parquet", "compare")),
}  # fmt: skip
