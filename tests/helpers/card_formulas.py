"""The formulas of method cards, evaluated on tokens: what a card claims of a method, as numbers.

The language is that of the cards: ``p_y^alpha``, ``1 where p_y >= threshold, else 0``, ``Q = p (1 - c), with c = log(p / q)``.
Vectors over the vocabulary are (N, V), all else is (N, 1). ``x_y`` is a vector's entry at the label, ``x_k`` the vector itself
within ``sum_k``. A semicolon ends what is said of the default parameters.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlens.core.segments import Groups
from qlens.core.tokens import MODELS, Tokens

TOKEN = re.compile(r"\s*(\d+\.?\d*(?:e-?\d+)?|[A-Za-z_]\w*|\|\||>=|<=|[-+/^()\[\],])")


class Claim(NamedTuple):
    """What a card says: trust (N, 1), scale (N, 1), and Q (N, V) as written out or as the mixture with the residual."""

    trust: Tensor
    scale: Tensor
    q: Tensor
    is_mixture: bool


def claim(card: Mapping[str, str], tokens: Tokens, params: Mapping[str, Any]) -> Claim:
    """The claim of a card's ``trust``, ``residual`` and ``scale``.

    Raises:
        ValueError: a formula cannot be read.
    """
    names = symbols(tokens, params)
    trust, scale = (evaluate(card[name], names, tokens) for name in ("trust", "scale"))
    written, _, formula = card["residual"].rpartition("Q = ")
    if formula != card["residual"] and not written:
        return Claim(trust, scale, evaluate(formula, names, tokens), False)
    residual = evaluate(card["residual"], names, tokens)
    return Claim(trust, scale, trust * names["d"] + (1 - trust) * residual, True)


def symbols(tokens: Tokens, params: Mapping[str, Any]) -> dict[str, Tensor]:
    """The names that formulas may use: distributions, masks, the advantage A, the entropy H and the parameters."""
    p = tokens.logits.softmax(-1)
    names = {
        "p": p,
        "student": p,
        "d": tokens.one_hot,
        "z": tokens.logits,
        "uniform": torch.full_like(p, 1 / p.shape[1]),
    }
    names |= {name: value.softmax(-1) for name in MODELS if (value := getattr(tokens, name)) is not None}
    names["H"] = -torch.special.xlogy(p, p).sum(-1, keepdim=True)
    masks = {name: getattr(tokens, name).to(p)[:, None] for name in ("critical", "hint", "chosen")}
    names |= masks | {"A": tokens.advantage[:, None], "negatives": tokens.negatives.to(p)}
    names["length"] = _sides(tokens).size(p[:, 0])[:, None]
    numbers = {name: value for name, value in params.items() if isinstance(value, int | float)}
    return names | {name: torch.tensor([[float(value)]], dtype=p.dtype) for name, value in numbers.items()}


def evaluate(text: str, names: Mapping[str, Tensor], tokens: Tokens) -> Tensor:
    """The value of a formula at the default parameters."""
    body, *definitions = re.split(r", with |, (?=\w+ = )", text.partition("; ")[0])
    values = dict(names)
    for definition in definitions:
        name, formula = definition.split(" = ", 1)
        values[name] = _cases(formula, values, tokens)
    return _cases(body, values, tokens)


def _cases(text: str, names: Mapping[str, Tensor], tokens: Tokens) -> Tensor:
    """``a where condition, else b``."""
    first, where, rest = text.partition(" where ")
    if not where:
        return _Parser(text, names, tokens).parse()
    condition, _, other = rest.partition(", else ")
    holds = _Parser(condition, names, tokens).parse()
    return torch.where(holds > 0, _cases(first, names, tokens), _cases(other, names, tokens))


class _Parser:
    """Sums of products of powers, with implicit multiplication, evaluated as they are read."""

    def __init__(self, text: str, names: Mapping[str, Tensor], tokens: Tokens):
        self.text, self.names, self.tokens = text, names, tokens
        self.words = TOKEN.findall(text)
        if "".join(self.words) != text.replace(" ", ""):
            raise ValueError(f"cannot read {text!r}")

    def parse(self) -> Tensor:
        value = self._comparison()
        if self.words:
            raise ValueError(f"cannot read {' '.join(self.words)!r} in {self.text!r}")
        return value

    def _take(self, *words: str) -> str:
        return self.words.pop(0) if self.words and (not words or self.words[0] in words) else ""

    def _expect(self, word: str) -> None:
        if not self._take(word):
            raise ValueError(f"expected {word!r} before {' '.join(self.words)!r} in {self.text!r}")

    def _comparison(self) -> Tensor:
        left = self._sum()
        sign = self._take(">=", "<=")
        if not sign:
            return left
        right = self._sum()
        return ((left >= right) if sign == ">=" else (left <= right)).to(left)

    def _sum(self) -> Tensor:
        value = self._product()
        while sign := self._take("+", "-"):
            value = value + self._product() * (1 if sign == "+" else -1)
        return value

    def _product(self) -> Tensor:
        value = self._factor()
        while self.words and self.words[0] not in ("+", "-", ")", "]", ",", "||", ">=", "<="):
            divides = bool(self._take("/"))
            factor = self._factor()
            value = value / factor if divides else value * factor
        return value

    def _factor(self) -> Tensor:
        if self._take("-"):
            return -self._factor()
        value = self._atom()
        return value ** self._factor() if self._take("^") else value

    def _atom(self) -> Tensor:
        word = self._take()
        if not word:
            raise ValueError(f"{self.text!r} ends too early")
        if word == "(":
            value = self._comparison()
            self._expect(")")
            return value
        if re.fullmatch(r"[\d.]+(e-?\d+)?", word):
            return torch.tensor([[float(word)]], dtype=self.names["p"].dtype)
        if word in self.names:
            return self.names[word]
        base, _, suffix = word.rpartition("_")
        if base in self.names and suffix in ("y", "k"):
            vector = self.names[base]
            return vector if suffix == "k" else vector.gather(1, self.tokens.labels[:, None])
        return self._function(word)

    def _function(self, name: str) -> Tensor:
        if name == "E_p":
            self._expect("[")
            value = (self.names["p"] * self._sum()).sum(-1, keepdim=True)
            self._expect("]")
            return value
        if name in ("KL", "min", "max", "top", "H_top"):
            self._expect("(")
            arguments = [self._sum()]
            while self._take(",", "||"):
                arguments.append(self._sum())
            self._expect(")")
            return _several(name, arguments, self.names["p"])
        value = self._factor()
        simple = {
            "log": Tensor.log,
            "exp": Tensor.exp,
            "sigma": torch.sigmoid,
            "sign": Tensor.sign,
            "softmax": _softmax,
        }
        simple |= {"sum_k": _total, "normalised": lambda x: x / _total(x), "mean": lambda x: x.mean().expand_as(x)}
        simple |= {"argmax": _first_largest, "one_hot": lambda x: x, "sum_t": self._sum_t, "margin": self._margin}
        simple["mean_t"] = lambda x: self._sum_t(x) / self._length()
        if name not in simple:
            raise ValueError(f"unknown {name!r} in {self.text!r}")
        return simple[name](value)

    def _sum_t(self, value: Tensor) -> Tensor:
        groups = _sides(self.tokens)
        return groups.total(value[:, 0])[groups.index][:, None]

    def _length(self) -> Tensor:
        return _sides(self.tokens).size(self.names["p"][:, 0])[:, None]

    def _margin(self, value: Tensor) -> Tensor:
        """Chosen minus rejected, of a value that each sequence has once for every token."""
        signed = torch.where(self.names["chosen"] > 0, value, -value) / self._length()
        groups = Groups(self.tokens.require("pair"))
        return groups.total(signed[:, 0])[groups.index][:, None]


def _several(name: str, arguments: list[Tensor], p: Tensor) -> Tensor:
    if name == "KL":
        a, b = arguments
        return (torch.special.xlogy(a, a) - torch.special.xlogy(a, b)).sum(-1, keepdim=True)
    if name in ("min", "max"):
        return (torch.minimum if name == "min" else torch.maximum)(*arguments)
    vector, k = arguments if name == "top" else (p, arguments[0])
    ids = vector.topk(min(int(k), vector.shape[1])).indices
    top_entries = torch.zeros_like(vector).scatter(1, ids, vector.gather(1, ids))
    if name == "top":
        return top_entries
    q = top_entries / _total(top_entries)
    return -_total(torch.special.xlogy(q, q))


def _sides(tokens: Tokens) -> Groups:
    return Groups(tokens.require("sequence"))


def _total(vector: Tensor) -> Tensor:
    return vector.sum(-1, keepdim=True)


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


def _first_largest(vector: Tensor) -> Tensor:
    first = (vector == vector.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1, keepdim=True)
    return torch.zeros_like(vector).scatter(1, first, 1.0)
