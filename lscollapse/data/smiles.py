"""Reaction SMILES: splitting into tokens, and a generator of well-formed reactions from lists of fragments.

The generated reactions are textbook transformations between common fragments, written as in patents: reactants,
reagents and solvent, `>>`, product. They are text for a model that was trained on such lines, not chemistry to rely on.
A fragment is a SMILES string whose first atom is its free valence; `*` marks where a further fragment goes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence

from lscollapse.data.texts import Text

MIN_TOKENS = 128

TOKEN = re.compile(r"\[[^\[\]\s]+\]|%\d\d|>>|Br|Cl|\S")
HEAD = re.compile(r"(\[[^\[\]]+\]|Br|Cl|[A-Za-z])((?:\d|%\d\d)*)")


def tokens(smiles: str) -> list[str]:
    """The atoms, bonds, brackets, ring numbers, dots and arrows of a SMILES string; nothing but white space is lost."""
    return TOKEN.findall(smiles)


SMALL = ["F", "Cl", "C", "OC", "C(F)(F)F", "C#N", "OC(F)(F)F", "C(C)(C)C", "S(C)(=O)=O", "C(=O)OC", "OCC", "C(C)C"]
LARGE = [
    "c1ccc(*)cc1", "c1cccc(*)c1", "c1ccccc1*", "c1ccc(*)nc1", "c1ccc(*)s1", "OCc1ccc(*)cc1", "Oc1ccc(*)cc1",
    "N1CCN(C(=O)OC(C)(C)C)CC1", "N1CCOCC1", "C(=O)N1CCC(*)CC1", "c1cnn(C)c1", "c1cc(*)on1", "C(=O)NCc1ccc(*)cc1",
    "NC(=O)c1cccc(*)c1",
]  # fmt: skip
ARYL = [
    "c1ccc(*)cc1", "c1cccc(*)c1", "c1ccc(*)nc1", "c1cnc(*)nc1", "c1ccc2[nH]ccc2c1", "c1ccc2ncc(*)cc2c1",
    "c1cc(*)cc(*)c1", "c1cc2c(cc1*)OCO2", "c1cc2ccccc2o1", "c1ccc(C(=O)Nc2ccc(*)cc2)cc1",
]  # fmt: skip
ACYL = [
    "Cc1ccc(*)cc1", "c1ccc(*)c(*)c1", "C1CCN(C(=O)OC(C)(C)C)CC1", "[C@@H](Cc1ccc(*)cc1)NC(=O)OC(C)(C)C", "c1csc(*)n1",
    "[C@H](C)NC(=O)OCc1ccccc1", "c1cc(*)nc(*)c1", "CCc1c(*)[nH]c2ccccc12", "c1nn(C)cc1*",
]  # fmt: skip
AMINE = [
    "NCc1ccc(*)cc1", "N1CCN(*)CC1", "N1CCC(*)CC1", "NC1CCN(C(=O)OC(C)(C)C)CC1", "NCCc1c[nH]c2ccc(*)cc12",
    "N[C@@H](Cc1ccccc1)C(=O)OC", "N1CCc2cc(*)ccc2C1", "N(C)CCc1ccc(*)cc1", "Nc1ccc(*)cc1", "N[C@H](C)c1ccc(*)cc1",
]  # fmt: skip
ALKYL = [
    "Cc1ccc(*)cc1", "CC1CCN(C(=O)OC(C)(C)C)CC1", "CCc1ccc(*)cc1", "Cc1cc(*)cc(*)c1", "CCN1CCN(*)CC1", "Cc1ccc(*)nc1",
    "CCOc1ccc(*)cc1",
]  # fmt: skip
DEFICIENT = [
    "c1ccc([N+](=O)[O-])cc1*", "c1c([N+](=O)[O-])cccc1*", "c1nccc(*)n1", "c1ncnc2cc(*)ccc12", "c1ccc([N+](=O)[O-])cn1",
    "c1nc(*)nc(*)n1", "c1ccnc2cc(*)ccc12",
]  # fmt: skip
FILLERS = [*LARGE, *SMALL]

COUPLING = [
    "CN(C)C(On1nnc2cccnc21)=[N+](C)C.F[P-](F)(F)(F)(F)F.CCN(C(C)C)C(C)C",
    "CCN=C=NCCCN(C)C.Cl.On1nnc2ccccc21.CCN(CC)CC",
    "CCCP1(=O)OP(=O)(CCC)OP(=O)(CCC)O1.CCN(C(C)C)C(C)C",
    "F[P-](F)(F)(F)(F)F.CN(C)[P+](On1nnc2ccccc21)(N(C)C)N(C)C.CN1CCOCC1",
]
PHOSPHINE = "c1ccc(P(c2ccccc2)c2ccccc2)cc1"
FERROCENE = "c1ccc(P(c2ccccc2)[c-]2cccc2)cc1.c1ccc(P(c2ccccc2)[c-]2cccc2)cc1.[Fe+2]"
PALLADIUM = [f"{'.'.join([PHOSPHINE] * 4)}.[Pd]", f"Cl[Pd]Cl.{FERROCENE}", f"CC(=O)O[Pd]OC(C)=O.{PHOSPHINE}"]
AMINATION = [
    "O=C(/C=C/c1ccccc1)/C=C/c1ccccc1.[Pd].CC(C)c1cc(C(C)C)c(-c2ccccc2P(C2CCCCC2)C2CCCCC2)c(C(C)C)c1",
    "CC(=O)O[Pd]OC(C)=O.CC1(C)c2cccc(P(c3ccccc3)c3ccccc3)c2Oc2c1cccc2P(c1ccccc1)c1ccccc1",
]
BASE = [f"O=C([O-])[O-].{metal}.{metal}" for metal in ("[K+]", "[Cs+]", "[Na+]")]
AMINE_BASE = ["CCN(CC)CC", "CCN(C(C)C)C(C)C", "c1ccncc1"]
HYDRIDE = ["CC(=O)O[BH-](OC(C)=O)OC(C)=O.[Na+].CC(=O)O", "[BH3-]C#N.[Na+].CC(=O)O", "[BH4-].[Na+]"]
POLAR = ["CN(C)C=O", "CC#N", "CS(C)=O", "CN1CCCC1=O"]
ETHER = ["C1COCCO1.O", "COCCOC.O", "Cc1ccccc1.O", "C1CCOC1"]
APROTIC = ["ClCCl", "ClCCCl", "C1CCOC1"]


class Draw:
    """Choices that depend on nothing but the key: sha256 of the key and a running number."""

    def __init__(self, key: str) -> None:
        self.key, self.drawn = key, 0

    def one(self, options: Sequence[str]) -> str:
        self.drawn += 1
        digest = hashlib.sha256(f"{self.key}:{self.drawn}".encode()).digest()
        return options[int.from_bytes(digest[:8]) % len(options)]

    def fragment(self, options: Sequence[str]) -> str:
        """One of the options with every `*` replaced by a fragment, all but the first one by a small one."""
        core, fillers = self.one(options), FILLERS
        while "*" in core:
            filler = self.one(fillers)
            if "*" in filler:
                filler = filler.replace("*", self.one(SMALL))
            core = core.replace("*", renumber(filler, highest_ring(core)), 1)
            fillers = SMALL
        return core


def highest_ring(smiles: str) -> int:
    """The highest ring number of a SMILES string, 0 if it has none."""
    return max((int(token.lstrip("%")) for token in tokens(smiles) if token.lstrip("%").isdigit()), default=0)


def renumber(smiles: str, by: int) -> str:
    """The same SMILES with its ring numbers raised, so that it can stand inside another one's open rings."""

    def raised(token: str) -> str:
        if not token.lstrip("%").isdigit():
            return token
        number = int(token.lstrip("%")) + by
        return str(number) if number < 10 else f"%{number}"

    return "".join(raised(token) for token in tokens(smiles))


def bond(first: str, second: str) -> str:
    """Two fragments joined by a single bond between their first atoms."""
    head = HEAD.match(first)
    assert head is not None, first
    return f"{head[0]}({renumber(second, highest_ring(head[2]))}){first[head.end() :]}"


One = Callable[[Sequence[str]], str]  # draws one of its options

# How a kind of reaction is put together: from which lists its two fragments a and b come, and what is in the pot, with the
# product last. Reagents and solvent are drawn in the order in which they are written.
KINDS: dict[str, tuple[list[str], list[str], Callable[[str, str, One], list[str]]]] = {
    "amide coupling": (ACYL, AMINE, lambda a, b, one: [
        f"OC(=O){a}", b, one(COUPLING), one(POLAR), bond(b, f"C(=O){a}")]),
    "esterification": (ACYL, ALKYL, lambda a, b, one: [
        f"OC(=O){a}", f"O{b}", "C(=NC1CCCCC1)=NC1CCCCC1.CN(C)c1ccncc1", one(APROTIC), bond(f"O{b}", f"C(=O){a}")]),
    "Suzuki coupling": (ARYL, ARYL, lambda a, b, one: [
        f"Br{a}", one([f"CC1(C)OB({renumber(b, 1)})OC1(C)C", f"OB(O){b}"]), one(PALLADIUM), one(BASE), one(ETHER), bond(a, b)]),
    "reductive amination": (ARYL, AMINE, lambda a, b, one: [
        f"O=C{a}", b, one(HYDRIDE), one(APROTIC), bond(b, f"C{a}")]),
    "nucleophilic aromatic substitution": (DEFICIENT, AMINE, lambda a, b, one: [
        one(["F", "Cl"]) + a, b, one(BASE), one(POLAR), bond(b, a)]),
    "Buchwald-Hartwig amination": (ARYL, AMINE, lambda a, b, one: [
        f"Br{a}", b, one(AMINATION), one(BASE), one(ETHER), bond(b, a)]),
    "sulfonamide formation": (ARYL, AMINE, lambda a, b, one: [
        f"ClS(=O)(=O){a}", b, one(AMINE_BASE), one(APROTIC), bond(b, f"S(=O)(=O){a}")]),
    "Mitsunobu reaction": (ARYL, ALKYL, lambda a, b, one: [
        f"O{a}", f"O{b}", f"{PHOSPHINE}.CC(C)OC(=O)N=NC(=O)OC(C)C", one(APROTIC), bond(f"O{a}", b)]),
}  # fmt: skip


def reaction(number: int, seed: int) -> Text:
    """Reaction `number` of a seed: at least `MIN_TOKENS` tokens, the same on every machine whatever else is drawn.

    The title is its kind and number, the text `reactants.reagents.solvent>>product`.
    """
    draw = Draw(f"{seed}:{number}")
    while True:
        kind = draw.one(list(KINDS))
        left, right, pot = KINDS[kind]
        *mixture, product = pot(draw.fragment(left), draw.fragment(right), draw.one)
        smiles = f"{'.'.join(mixture)}>>{product}"
        if len(tokens(smiles)) >= MIN_TOKENS:
            return Text(f"{kind} {number}", smiles)


def reactions(count: int, seed: int) -> Iterator[Text]:
    """`count` reactions of a seed, all different."""
    seen: set[str] = set()
    number = 0
    while len(seen) < count:
        number += 1
        drawn = reaction(number, seed)
        if drawn.text not in seen:
            seen.add(drawn.text)
            yield drawn
