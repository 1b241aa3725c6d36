"""Generated reaction SMILES: grammar, vocabulary, atoms, and the same on every machine."""

from __future__ import annotations

import hashlib
import re
from collections import Counter

import pytest

from lscollapse.core import assets
from lscollapse.data import corpus, smiles, tokenizers
from lscollapse.data.texts import CorpusError

SAMPLE = list(smiles.reactions(400, seed=11))
ORGANIC = {"B", "C", "N", "O", "P", "S", "F", "Cl", "Br", "I", "b", "c", "n", "o", "p", "s"}


def vocabulary() -> list[str]:
    return assets.locate(assets.SMILES_VOCAB).read_text(encoding="utf-8").split("\n")


def molecules(reaction: str) -> list[str]:
    return reaction.replace(">>", ".").split(".")


def elements(text: str) -> Counter[str]:
    """Heavy atoms by element, read character by character."""
    bracketless = re.sub(r"\[(?:\d+)?([A-Z][a-z]?|[a-z])[^\]]*\]", lambda m: f" {m[1].rstrip('H') or 'H'} ", text)
    return Counter(atom.capitalize() for atom in re.findall(r"Br|Cl|Na|Pd|Cs|Fe|[BCNOPSFIK]|[cnops]", bracketless))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("CC(=O)Cl.N", ["C", "C", "(", "=", "O", ")", "Cl", ".", "N"]),
        ("c1([C@@H](N)Br)c1>>[Na+]", ["c", "1", "(", "[C@@H]", "(", "N", ")", "Br", ")", "c", "1", ">>", "[Na+]"]),
        ("C%12=C/C#N%12", ["C", "%12", "=", "C", "/", "C", "#", "N", "%12"]),
        ("C C\n", ["C", "C"]),
    ],
)
def test_tokens(text: str, parts: list[str]) -> None:
    assert smiles.tokens(text) == parts


def test_ids_are_lines_of_the_vocabulary_file() -> None:
    lines = vocabulary()
    tokenizer = tokenizers.smiles()
    assert tokenizer.vocab_size == 591  # the model's embedding
    assert [lines[i] for i in tokenizer.encode_batch(["C[C@H](O)>>[Pd]"])[0]] == [
        "C",
        "[C@H]",
        "(",
        "O",
        ")",
        ">>",
        "[Pd]",
    ]
    assert [lines[i] for i in tokenizer.encode_batch(["[Xx]C?"])[0]] == ["[UNK]", "C", "[UNK]"]


def test_every_token_is_known_and_there_are_enough() -> None:
    unknown = vocabulary().index("[UNK]")
    for ids in tokenizers.smiles().encode_batch([reaction.text for reaction in SAMPLE]):
        assert unknown not in ids
        assert 128 <= len(ids) <= 512


def test_parentheses_and_rings_close() -> None:
    for reaction in SAMPLE:
        for molecule in molecules(reaction.text):
            depth = 0
            rings: set[int] = set()
            for match in re.finditer(r"\[[^\]]*\]|%\d\d|.", molecule):
                depth += {"(": 1, ")": -1}.get(match[0], 0)
                assert depth >= 0, molecule
                if match[0].lstrip("%").isdigit():
                    rings ^= {int(match[0].lstrip("%"))}
            assert depth == 0 and not rings, molecule
            assert not re.search(r"\(\)|\*", molecule)


def test_product_is_one_molecule_made_of_reactant_atoms() -> None:
    for reaction in SAMPLE:
        mixture, product = reaction.text.split(">>")
        assert "." not in product
        assert elements(product) <= elements(mixture), reaction
        assert mixture.count(".") >= 3  # two reactants, a reagent, a solvent


def test_valences_of_carbon() -> None:
    """No carbon outside brackets has more than four bonds (aromatic ones count one and a half)."""
    for reaction in SAMPLE:
        for molecule in molecules(reaction.text):
            assert max(carbon_bonds(molecule), default=0) <= 4.5, molecule


def carbon_bonds(molecule: str) -> list[float]:
    """Bond orders at each plain carbon atom, from a small stack reader of SMILES."""
    atoms: list[str] = []
    bonds: list[tuple[int, int, float]] = []
    stack: list[int | None] = []
    rings: dict[str, int] = {}
    last: int | None = None
    order: float | None = None

    def join(a: int, b: int) -> None:
        both_aromatic = atoms[a].islower() and atoms[b].islower()
        bonds.append((a, b, order if order is not None else 1.5 if both_aromatic else 1.0))

    for token in re.findall(r"\[[^\]]*\]|%\d\d|Br|Cl|.", molecule):
        if token == "(":
            stack.append(last)
        elif token == ")":
            last = stack.pop()
        elif token in "-=#/\\":
            order = {"=": 2.0, "#": 3.0}.get(token, 1.0)
        elif token.lstrip("%").isdigit():
            assert last is not None
            if token in rings:
                join(rings.pop(token), last)
            else:
                rings[token] = last
            order = None
        else:
            assert token in ORGANIC or token[0] == "[", token
            atoms.append(token)
            if last is not None:
                join(last, len(atoms) - 1)
            last, order = len(atoms) - 1, None
    degree = [0.0] * len(atoms)
    for a, b, weight in bonds:
        degree[a] += weight
        degree[b] += weight
    return [degree[i] for i, atom in enumerate(atoms) if atom in "Cc"]


def test_reactions_differ_and_do_not_depend_on_how_many_are_drawn() -> None:
    assert len({reaction.text for reaction in SAMPLE}) == len(SAMPLE)
    assert list(smiles.reactions(5, seed=11)) == SAMPLE[:5]
    assert list(smiles.reactions(5, seed=12)) != SAMPLE[:5]
    assert {reaction.title.rsplit(" ", 1)[0] for reaction in SAMPLE} == set(smiles.KINDS)


def test_the_same_on_every_machine() -> None:
    """A test vector: the default excerpts."""
    found = corpus.draw_excerpts("smiles")
    record = "\n".join(excerpt.text_sha256 for excerpt in found.excerpts)
    assert (
        hashlib.sha256(record.encode()).hexdigest()
        == "684651c5272abf37d584411dcd8642e2578b816af613d62ee00b5989a9c8049a"
    )
    assert found.source == "generated reaction SMILES" and found.skipped == 0
    assert {(len(excerpt.ids), excerpt.tokenizer) for excerpt in found.excerpts} == {(128, "rxnmapper-smiles")}


def test_no_reaction_is_endlessly_long() -> None:
    with pytest.raises(CorpusError, match="has 0 texts of at least 2000 tokens"):
        corpus.draw_excerpts("smiles", 1, 2000)
