"""JSON: lines of objects or texts, or one array of them, read as it comes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from actcache.cli.corpus.document import Document, id_of, like, listed, unnamed
from actcache.cli.corpus.text import LONGEST
from actcache.errors import DocumentError

#: A value and where it stands.
Item = tuple[str, Any]

_SPACE = re.compile(r"[ \t\n\r]*")
_NEAR_THE_END = 16  # characters; a value that was cut off inside of a word or an escape fails so near
_WORDS = {str: "a text", dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number"}


class _Repeated(dict[str, Any]):
    """An object in which a field stands more than once: which of its values is meant, nobody can tell."""

    repeated: frozenset[str]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    names = [name for name, _ in pairs]
    marked = _Repeated(found)
    marked.repeated = frozenset(name for name in found if names.count(name) > 1)
    return marked


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def by_lines(lines: Iterator[str]) -> Iterator[Item]:
    """Yield the value of each line that is not blank."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield f"line {number}", _DECODER.decode(line)
            except (ValueError, RecursionError) as error:
                hint = "of a table, or of one JSON value over many lines, say the --format"
                raise DocumentError(f"line {number} is no JSON ({error}); {hint}") from None


def by_values(pieces: Iterator[str]) -> Iterator[Item]:
    """Yield the items of an array, or values that stand one after another; one at a time is in memory."""
    text = _Text(pieces)
    if text.next_character() != "[":
        while text.next_character():
            yield text.value()
        return
    text.skip()
    first = True
    while (character := text.next_character()) != "]":
        if not first:
            if character != ",":
                raise DocumentError(f"{text.where()}: no JSON array (expecting ',' or ']')")
            text.skip()
            text.next_character()
        first = False
        yield text.value()
    text.skip()
    if text.next_character():
        raise DocumentError(f"{text.where()}: something stands behind the end of the JSON array")


class _Text:
    """A JSON text of which no more is held than the value that comes next. Not thread-safe."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self._more = pieces
        self._held, self._position = "", 0
        self._line, self._counted = 1, 0  # the line that this place of what is held stands in

    def where(self) -> str:
        self._line, self._counted = self._line_of(self._position), self._position
        return f"line {self._line}"

    def _line_of(self, position: int) -> int:
        return self._line + self._held.count("\n", self._counted, position)

    def next_character(self) -> str:
        """Go to what is no space, and return it; nothing at the end."""
        while True:
            self._position = _SPACE.match(self._held, self._position).end()  # type: ignore[union-attr]
            if self._position < len(self._held):
                return self._held[self._position]
            if not self._read(1):
                return ""

    def skip(self) -> None:
        self._position += 1

    def value(self) -> Item:
        """Return the object or text that stands here."""
        where = self.where()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._held, self._position)
            except json.JSONDecodeError as error:
                held = len(self._held) - self._position
                # Cut off: a text that does not end, or a failure where what is held ends. Twice as much may do.
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self._held) - _NEAR_THE_END
                if not (cut and held < LONGEST and self._read(held)):
                    raise DocumentError(f"{where}: no JSON ({error.msg} in line {self._line_of(error.pos)})") from None
            except (ValueError, RecursionError) as error:
                raise DocumentError(f"{where}: no JSON ({error})") from None
            else:
                # A number may go on behind what is held. No number is a document, so that it does not matter.
                self._position = end
                return where, value

    def _read(self, characters: int) -> bool:
        """Hold so many more, at least; return whether there were any."""
        self.where()
        pieces, got = [self._held[self._position :]], 0
        for piece in self._more:
            pieces.append(piece)
            got += len(piece)
            if got >= characters:
                break
        self._held, self._position, self._counted = "".join(pieces), 0, 0
        return got > 0


def documents(items: Iterator[Item], field: str | None, id_field: str | None) -> Iterator[Document]:
    """Yield the texts under a field of objects, or that stand alone without one; what is null or empty is none."""
    for where, value in items:
        if field is None:
            text, name = _alone(where, value), None
        else:
            text, name = _under(where, value, field), None if id_field is None else _get(where, value, id_field)
        if text:
            yield Document(text, id_of(name, where))


def _alone(where: str, value: Any) -> str | None:
    if isinstance(value, dict):
        raise DocumentError(f"{where}: {unnamed(list(value), 'field')}")
    if value is not None and not isinstance(value, str):
        raise DocumentError(f"{where} holds {_word(value)}, not a text{_ARRAY if isinstance(value, list) else ''}")
    return _whole(where, value)


_ARRAY = "; if the file is one JSON array, say --format json"


def _under(where: str, value: Any, field: str) -> str | None:
    text = _get(where, value, field)
    if text is not None and not isinstance(text, str):
        inner = f"; the fields inside of it ({listed(list(text))}) are not read" if isinstance(text, dict) else ""
        raise DocumentError(f"{where}: the field {field!r} holds {_word(text)}, not a text{inner}")
    return _whole(where, text)


def _get(where: str, value: Any, field: str) -> Any:
    if not isinstance(value, dict):
        hint = "; leave --field out" if isinstance(value, str) else _ARRAY if isinstance(value, list) else ""
        raise DocumentError(f"{where} holds {_word(value)}, not an object with a field {field!r}{hint}")
    if field not in value:
        raise DocumentError(
            f"{where}: there is no field {field!r}; there are {listed(list(value))}{like(list(value), field)}"
            f"{_nested(value, field)}"
        )
    if isinstance(value, _Repeated) and field in value.repeated:
        raise DocumentError(f"{where}: the field {field!r} stands there more than once")
    return value[field]


def _nested(value: dict[str, Any], field: str) -> str:
    """Return a hint where a path was given instead of a name."""
    outer, dot, _ = field.partition(".")
    if dot and isinstance(value.get(outer), dict):
        return f"; fields inside of {outer!r} are not read: flatten the objects, as with jq -c '{{text: .{field}}}'"
    return ""


def _whole(where: str, text: str | None) -> str | None:
    if text is not None and not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DocumentError(f"{where}: the text holds half a character (\\u{ord(text[error.start]):04x})") from None
    return text


def _word(value: Any) -> str:
    return "null" if value is None else _WORDS.get(dict if isinstance(value, dict) else type(value), "no text")
