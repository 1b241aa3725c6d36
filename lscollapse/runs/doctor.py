"""What this machine has, and whether a configuration can run on it. Loads no model; asks hub and Wikipedia shortly.

Tokens, contacts, and of an address more than its host are never shown.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from importlib import util
from pathlib import Path

import torch

from lscollapse.core import allocation, assets, files, manifest, registry
from lscollapse.core.config import ConfigError, Experiment, WikipediaSection
from lscollapse.data import corpus, texts, wikipedia
from lscollapse.data.texts import CorpusError
from lscollapse.models.kernels.backends import KernelError, Kernels, resolve_kernels
from lscollapse.models.kernels.native_build import cpu_flags
from lscollapse.runs import devices
from lscollapse.runs.model_checks import Diagnosis, asked, model_findings

BLOCK = 64 * 2**20  # bytes, to see whether freed memory is kept
PINNED = (
    assets.SUMMARIES, assets.BERT_VOCAB, assets.MINILM_CONFIG, assets.MINILM_WEIGHTS, assets.SMILES_CONFIG,
    assets.SMILES_WEIGHTS, assets.SMILES_VOCAB,
)  # fmt: skip


def examine(config: Experiment) -> list[Diagnosis]:
    """Everything that decides whether `config` runs here, in the order in which a run would meet it."""
    return [
        Diagnosis("versions", _versions()),
        *_devices(config),
        *_engine(config),
        _allocator(),
        _embedded(config),
        *_source(config),
        *model_findings(config),
    ]


def _versions() -> str:
    found = manifest.environment()
    known = {"Python": found["python"], **found["versions"]}
    return (
        ", ".join(f"{name} {version or 'not installed'}" for name, version in known.items()) + f"; {found['machine']}"
    )


def _devices(config: Experiment) -> Iterator[Diagnosis]:
    try:
        on = devices.worker_devices(config)
    except ConfigError as error:
        yield Diagnosis("device", "not there", str(error))
        return
    gpus = [torch.cuda.get_device_name(name) for name in on if name != "cpu"]
    cpu = f"cpu ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"
    yield Diagnosis("device", ", ".join(gpus) or cpu + (f", {len(on)} processes" if len(on) > 1 else ""))
    try:
        kernels = resolve_kernels(config.kernels, on[0], products=config.products)
    except KernelError as error:
        yield Diagnosis("kernels", f"{config.kernels} cannot run", str(error))
    else:
        paths = ", ".join(f"{what} {_path(getattr(kernels, what))}" for what in ("scan", "conv", "gated_norm"))
        paths = kernels.own.__name__ if kernels.own else type(kernels.native).__module__ if kernels.native else paths
        yield Diagnosis("kernels", f"{paths} ({kernels.backend}): {_why(kernels, config)}", good=not kernels.note)
    bf16 = _bf16(on[0])
    slow = (
        ""
        if bf16 or config.dtype != "bfloat16"
        else ": bfloat16 runs here, but slower than float32, other than Mamba-2"
    )
    yield Diagnosis("bfloat16", ("in hardware" if bf16 else "no instructions for it") + slow, good=not slow)


def _why(kernels: Kernels, config: Experiment) -> str:
    if kernels.note or config.kernels != "auto":
        return kernels.note or "as asked for"
    return "Triton is there" if kernels.triton else "compiled here, and right to float32"


def _path(function: object) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__name__', '')}"


def _bf16(device: str) -> bool:
    """Whether products of bfloat16 have instructions of their own; on a CPU as Linux lists them."""
    if device != "cpu":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool({"avx512_bf16", "amx_bf16", "bf16"}.intersection(cpu_flags().split()))


def _engine(config: Experiment) -> Iterator[Diagnosis]:
    if config.engine == "ray":
        there = util.find_spec("ray") is not None
        yield Diagnosis(
            "ray", "installed" if there else "not installed", "" if there else 'pip install "lscollapse[cluster]"'
        )


def _allocator() -> Diagnosis:
    """Whether the setting took effect: a large block that is taken again and again soon brings no new pages."""

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(BLOCK // 4)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    kept = allocation.keep_freed_memory() and min(faults() for _ in range(5)) < BLOCK // resource.getpagesize() // 10
    return Diagnosis(
        "malloc", "keeps freed memory" if kept else "returns freed memory: a CPU pass runs slower", good=kept
    )


def _embedded(config: Experiment) -> Diagnosis:
    """Whether the files of the data packages are as pinned, and above all those that the configuration needs."""
    missing = []
    for asset in PINNED:
        try:
            assets.locate(asset)
        except assets.AssetError:
            missing.append(asset)
    found = f"{len(PINNED) - len(missing)} of {len(PINNED)} files, sha256 as pinned"
    needed = [assets.SUMMARIES] if config.source == "packaged" else []
    needed += [assets.BERT_VOCAB] if config.tokenizer in (None, "bert") else []
    try:
        for name in config.models:
            entry = registry.ENTRIES.get(registry.ALIASES.get(name, name))  # None: no short name, so not embedded
            if entry is not None and entry.embedded:
                registry.embedded_files(entry)
        for asset in needed:
            assets.locate(asset)
    except assets.AssetError as error:
        return Diagnosis("embedded data", found, str(error))
    return Diagnosis("embedded data", found, good=not missing)


def _source(config: Experiment) -> Iterator[Diagnosis]:
    source = None if config.source in corpus.SOURCES else Path(config.source)
    for name, file in (("titles", config.wikipedia.titles), ("lambdas", config.lambdas_file), ("source", source)):
        if file is not None:
            yield _file(name, file)
    yield _wikipedia(config.wikipedia, config.source == "wikipedia", config.offline)


def _file(name: str, file: Path) -> Diagnosis:
    """A file that a person gave; text is read, pictures and Parquet are left to their readers."""
    if not os.path.lexists(file):
        instead = f", or a source of {', '.join(corpus.SOURCES)}" if name == "source" else ""
        return Diagnosis(name, f"no {file}", f"give a file{instead}")
    try:
        if name == "titles":
            texts.read_titles(file)
        elif not (name == "source" and (os.path.isdir(file) or file.suffix == ".parquet")):
            files.read_text(file, CorpusError, texts.LARGEST_TEXTS)
        elif not os.path.isdir(file):
            files.refuse_no_file(file, CorpusError)
    except CorpusError as error:
        return Diagnosis(name, "cannot be read", str(error))
    return Diagnosis(name, f"{file} is there")


def _wikipedia(wiki: WikipediaSection, needed: bool, offline: bool) -> Diagnosis:
    name, agent, mend = "Wikipedia", "", ""
    try:
        settings = wiki.model_copy(update={"cache_dir": None})
        with wikipedia.Articles(settings, 0, [], 0) as articles:
            name, agent = articles.source, wiki.contact
    except CorpusError as error:
        if needed:
            mend = str(error).replace(repr(wiki.contact), "given").replace(repr(wiki.endpoint), "given")
    url = wiki.endpoint or f"https://{wiki.language}.wikipedia.org/w/api.php"
    query = {"action": "query", "format": "json", "list": "random", "rnnamespace": "0", "rnlimit": "1"}
    fault = "not asked (offline)" if offline else asked(url, query, {"User-Agent": wikipedia.user_agent(agent)})
    if needed and fault and not offline and not mend:
        mend = "use --source packaged or a frozen file, or run where it can be reached"
    return Diagnosis("Wikipedia", f"{name}: {fault or 'answers'}", mend, good=offline or not fault)
