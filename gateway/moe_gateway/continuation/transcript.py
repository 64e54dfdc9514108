"""What the client of a stream has got so far: its text by field, its tokens, and where a stream can be cut. Pure.

A cut is a number of tokens after which another engine computes on. What the client has beyond it is computed again and
left out. Two things forbid to cut at the last token: the bytes of a character may be spread over several tokens, and
for stop strings an engine holds the newest text back and looks for them across tokens.
"""

from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

# A longer answer is not remembered: 4 bytes a token, 1 to 4 a character. Nor are the ids of a longer prompt.
MOST_TOKENS = 256 * 1024
MOST_CHARACTERS = 2 * 1024 * 1024
# The text of this many chunks is joined: a string of its own costs 50 bytes more than its characters.
PARTS_A_BLOCK = 64
# A cut further back than this, and than a stop string can reach, is not worth the tokens computed again.
MOST_CHUNKS_BACK = 16
# The field of a piece that is no text of the model.
MARK = ""


class Piece(NamedTuple):
    """Some text of one field: `text` of completions, `content` or `reasoning` of chats; or a mark of an event."""

    field: str
    text: str


class Cut(NamedTuple):
    """Where a stream is cut: `tokens` are given to another engine; their text has `characters` characters."""

    tokens: int
    characters: int


class _Boundary(NamedTuple):
    """The end of a chunk, at which a stream may be cut.

    Attributes:
        number: of the chunk, among those with text.
        cut: where the stream is cut there.
        is_clean: whether its last token completed a character, so none is spread beyond it. Else the next character
            shows it: one that began before the end of the chunk is not of ASCII.
    """

    number: int
    cut: Cut
    is_clean: bool


class Transcript:
    """The text and the tokens of one stream.

    Args:
        stops: stop strings of the request.
        includes_stop: whether a stop string is part of the answer, so that no text is held back for it.

    Attributes:
        tokens: ids of the tokens so far; empty where they are not known.
        characters: length of the text so far, the marks of its fields included.
        is_lost: whether it is too long to be remembered.
    """

    __slots__ = (
        "_blocks",
        "_chunks",
        "_field",
        "_held_back",
        "_last",
        "_most_back",
        "_overlap",
        "_parts",
        "_pending",
        "_tail",
        "characters",
        "is_lost",
        "tokens",
    )

    def __init__(self, stops: Iterable[str] = (), *, includes_stop: bool = False) -> None:
        reach = max((len(stop) - 1 for stop in stops), default=0)
        self._held_back = 0 if includes_stop else reach
        # Text before the end that is computed again, so that a stop string that begins in it is found.
        self._overlap = reach - self._held_back
        # The last boundary at which it can be cut; those after it that more text may allow; the text that these need.
        self._last: _Boundary | None = None
        self._pending: deque[_Boundary] = deque()
        self._tail = ""
        self._chunks = 0
        self._most_back = reach + MOST_CHUNKS_BACK
        self._blocks: list[str] = []
        self._parts: list[str] = []
        self._field = ""
        self.tokens = array("I")
        self.characters = 0
        self.is_lost = False

    def add(self, pieces: Sequence[Piece], tokens: Sequence[int], *, is_single: bool = False) -> None:
        """A chunk with these pieces and tokens went to the client; `is_single`: its engine sent one token in it."""
        before = self.characters
        for piece in pieces:
            part = self._marked(self._field, piece)
            if part:
                self._add_part(part)
                self._field = piece.field
        self.tokens.extend(tokens)
        if self.characters > MOST_CHARACTERS or len(self.tokens) > MOST_TOKENS:
            self.forget()
        elif self.characters > before:
            if tokens:
                self._chunks += 1
                cut = Cut(len(self.tokens), self.characters + self._held_back)
                self._pending.append(_Boundary(self._chunks, cut, is_clean=is_single))
            self._settle()

    def _add_part(self, part: str) -> None:
        self._parts.append(part)
        if len(self._parts) >= PARTS_A_BLOCK:
            self._blocks.append("".join(self._parts))
            self._parts.clear()
        self.characters += len(part)
        self._tail += part

    def _settle(self) -> None:
        """Decides about the boundaries for which enough text has come, and keeps the text that the others need."""
        pending, start = self._pending, self.characters - len(self._tail)
        while pending:
            boundary = pending[0]
            at = boundary.cut.characters
            if at > self.characters - self._overlap or (at >= self.characters and not boundary.is_clean):
                break
            pending.popleft()
            if boundary.is_clean or self._tail[at - start].isascii():
                self._last = boundary
        self._tail = self._tail[max(0, pending[0].cut.characters - start) :] if pending else ""

    def forget(self) -> None:
        """Forgets it all: the stream cannot go on elsewhere."""
        self.is_lost = True
        self._blocks.clear()
        self._parts.clear()
        self._pending.clear()
        self._last, self._tail = None, ""
        self.tokens = array("I")

    @staticmethod
    def _marked(field: str, piece: Piece) -> str:
        """The text of a piece, with its field before it where that is another one than before."""
        return piece.text if not piece.text or piece.field == field else f"\0{piece.field}\0{piece.text}"

    def find_cut(self) -> Cut | None:
        """The last place at which the stream can be cut; None where none is near its end.

        The text of the tokens up to a cut is longer than the text sent with them by the characters held back.
        """
        last = self._last
        return None if last is None or self._chunks - last.number >= self._most_back else last.cut

    def text_from(self, characters: int) -> str:
        """The text from this position on, with the marks of its fields."""
        missing, taken = self.characters - characters, []
        for part in chain(reversed(self._parts), reversed(self._blocks)):
            if missing <= 0:
                break
            taken.append(part)
            missing -= len(part)
        return "".join(reversed(taken))[max(0, -missing) :]

    def expect(self, cut: Cut | None) -> "Expected":
        """What another engine computes again, from a cut or from the beginning on."""
        if cut is None:
            return Expected(self.text_from(0), "", self.tokens[:])
        return Expected(self.text_from(cut.characters), self._field, self.tokens[cut.tokens :])


class Mismatch(Exception):
    """Another engine computed something else than what the client has."""


class Expected:
    """What the client has of a stream that another engine computes again.

    Args:
        text: with the marks of its fields.
        field: of the text before it; empty at the beginning.
        tokens: their ids; empty where they are not known.
    """

    __slots__ = ("_field", "_text", "_tokens")

    def __init__(self, text: str, field: str, tokens: "array[int]") -> None:
        self._text = text
        self._field = field
        self._tokens = tokens

    @property
    def is_past(self) -> bool:
        """Whether everything expected has come."""
        return not self._text and not self._tokens

    def subtract(self, pieces: Sequence[Piece], tokens: "array[int]") -> "tuple[list[Piece], array[int]]":
        """Returns the pieces and tokens of a chunk that are new.

        Raises:
            Mismatch: the chunk differs from what the client has.
        """
        return [self._subtract_piece(piece) for piece in pieces], self._subtract_tokens(tokens)

    def _subtract_tokens(self, tokens: "array[int]") -> "array[int]":
        if not self._tokens:
            return tokens
        common = min(len(tokens), len(self._tokens))
        if tokens[:common] != self._tokens[:common]:
            raise Mismatch
        self._tokens = self._tokens[common:]
        return tokens[common:]

    def _subtract_piece(self, piece: Piece) -> Piece:
        marked = Transcript._marked(self._field, piece)
        if not marked or not self._text:
            return piece
        self._field = piece.field
        common = min(len(marked), len(self._text))
        new = len(marked) - common
        if marked[:common] != self._text[:common] or new > len(piece.text):
            raise Mismatch
        self._text = self._text[common:]
        return Piece(piece.field, piece.text[len(piece.text) - new :])
