"""How conditions on the facts about images are written, such as `year > 2020 and folder = 'beach'`, and read.

    condition   = both {"or" both}
    both        = single {"and" single}
    single      = "not" single | "(" condition ")" | column test
    test        = ("=" | "!=" | "<>" | "<" | "<=" | ">" | ">=") value | "is" ["not"] "null"
                | ["not"] "in" "(" value {"," value} ")" | ["not"] "like" text
    column      = a word, or anything in double quotes
    value       = number | 'text' | true | false; dates and times are text: '2020-01-31', '2020-01-31 18:30'

As in SQL, words like `and` may be in capitals, `%` and `_` in a pattern of `like` match any text and any character,
and a column that is null (or not a number, NaN) fulfils no test but `is null`, not even a negated one.
"""

from __future__ import annotations

import re
from datetime import date, datetime
from typing import NamedTuple

from clipadapt.errors import ClipadaptError

Value = bool | int | float | str | date | datetime

_TOKEN = re.compile(
    r"""\s*(?:
        (?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.]))
      | (?P<text>'(?:[^']|'')*')
      | (?P<quoted>"(?:[^"]|"")+")
      | (?P<word>[^\W\d]\w*)
      | (?P<sign><=|>=|!=|<>|[=<>(),])
      | (?P<end>$)
    )""",
    re.VERBOSE,
)
_KEYWORDS = {"and", "or", "not", "in", "like", "is", "null", "true", "false"}
_OPPOSITE = {"=": "!=", "<": ">=", ">": "<=", "in": "not in", "like": "not like", "is null": "is not null"}
_OPPOSITE |= {negated: test for test, negated in _OPPOSITE.items()}
_DEEPEST = 100  # parentheses and `not` within each other: a condition may come from a stranger


class Test(NamedTuple):
    """One test of one column."""

    column: str
    operator: str  # = != < <= > >= in "not in" like "not like" "is null" "is not null"
    values: tuple[Value, ...]  # one; several for "in"; none for "is null"

    def negate(self) -> Test:
        return self._replace(operator=_OPPOSITE[self.operator])


class Junction(NamedTuple):
    """Several conditions, of which all ("and") or any ("or") must hold."""

    word: str
    parts: tuple[Test | Junction, ...]

    def negate(self) -> Junction:
        return Junction("or" if self.word == "and" else "and", tuple(part.negate() for part in self.parts))


def parse(text: str) -> Test | Junction:
    """Read a condition; raises `ClipadaptError` that names the place and what was expected there."""
    return _Parser(text).whole()


class _Token(NamedTuple):
    kind: str  # a group of _TOKEN, or "keyword"
    text: str
    place: int  # of its first character, from 0


class _Parser:
    """Recursive descent, one token ahead."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.place = 0
        self.depth = 0
        self.token = self._next()

    def whole(self) -> Test | Junction:
        tree = self._condition()
        if self.token.kind != "end":
            raise self._expected_error("and, or, or the end")
        return tree

    def _condition(self) -> Test | Junction:
        parts = [self._both()]
        while self._took("or"):
            parts.append(self._both())
        return parts[0] if len(parts) == 1 else Junction("or", tuple(parts))

    def _both(self) -> Test | Junction:
        parts = [self._single()]
        while self._took("and"):
            parts.append(self._single())
        return parts[0] if len(parts) == 1 else Junction("and", tuple(parts))

    def _single(self) -> Test | Junction:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise ClipadaptError(f"The condition is nested more than {_DEEPEST} levels deep; simplify it.")
        tree: Test | Junction
        if self._took("not"):
            tree = self._single().negate()
        elif self._took("("):
            tree = self._condition()
            self._take(")")
        else:
            tree = self._test()
        self.depth -= 1
        return tree

    def _test(self) -> Test:
        kind, text, _ = self.token
        if kind not in ("word", "quoted"):
            raise self._expected_error("a column, not or (")
        self.token = self._next()
        column = text[1:-1].replace('""', '"') if kind == "quoted" else text
        if self._took("is"):
            operator = "is not null" if self._took("not") else "is null"
            self._take("null")
            return Test(column, operator, ())
        negated = self._took("not")
        if self._took("in"):
            self._take("(")
            values = [self._value()]
            while self._took(","):
                values.append(self._value())
            self._take(")")
            test = Test(column, "in", tuple(values))
        elif self._took("like"):
            if self.token.kind != "text":
                raise self._expected_error("a pattern in single quotes")
            test = Test(column, "like", (self._value(),))
        elif not negated and self.token.text in ("=", "!=", "<>", "<", "<=", ">", ">="):
            operator = self.token.text.replace("<>", "!=")
            self.token = self._next()
            test = Test(column, operator, (self._value(),))
        else:
            raise self._expected_error("in or like" if negated else "=, !=, <, <=, >, >=, in, like or is")
        return test.negate() if negated else test

    def _value(self) -> Value:
        kind, text, _ = self.token
        value: Value
        if kind == "number":
            value = float(text) if re.search("[.eE]", text) else int(text)
            if abs(value) >= (1 << 63 if isinstance(value, int) else float("inf")):
                raise self._expected_error("a number of 64 bits")
        elif kind == "text" and "\0" not in text:
            value = text[1:-1].replace("''", "'")
        elif kind == "keyword" and text in ("true", "false"):
            value = text == "true"
        elif text == "null":
            raise self._expected_error("a value (write: is null)")
        else:
            raise self._expected_error("a number, text in single quotes, true or false")
        self.token = self._next()
        return value

    def _took(self, text: str) -> bool:
        """Whether this keyword or sign comes next; if so it is taken."""
        if self.token.kind not in ("keyword", "sign") or self.token.text != text:
            return False
        self.token = self._next()
        return True

    def _take(self, text: str) -> None:
        if not self._took(text):
            raise self._expected_error(text)

    def _next(self) -> _Token:
        match = _TOKEN.match(self.text, self.place)
        if match is None:
            rest = self.text[self.place :].lstrip()
            what = "the closing quote of" if rest[0] in "'\"" else "a column, a value or a sign at"
            raise self._error(len(self.text) - len(rest), f"expected {what} {_short(rest)}")
        kind = str(match.lastgroup)
        text, place, self.place = match[kind], match.start(kind), match.end()
        if kind == "word" and text.lower() in _KEYWORDS:
            return _Token("keyword", text.lower(), place)
        return _Token(kind, text, place)

    def _expected_error(self, what: str) -> ClipadaptError:
        found = "the end" if self.token.kind == "end" else _short(self.token.text)
        return self._error(self.token.place, f"expected {what}, found {found}")

    def _error(self, place: int, what: str) -> ClipadaptError:
        return ClipadaptError(f"The condition {_short(self.text, 200)} is wrong at character {place + 1}: {what}.")


def _short(text: str, length: int = 30) -> str:
    return repr(text if len(text) <= length else text[: length - 1] + "…")
