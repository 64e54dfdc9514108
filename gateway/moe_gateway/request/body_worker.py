"""A process that parses large bodies, so that the gateway's streams go on meanwhile. Started by `BodyReader`.

A parser holds the interpreter for as long as it runs, so a thread would stop the event loop as well.

It reads questions from its standard input and writes answers to its standard output, until its input ends. A question
is the number of a route in one byte, the length of a body in 8 and the body. An answer is the lengths of a JSON array
and of a prompt in 4 bytes each, the array, and the beginning of the prompt. The array has a message and a parameter for
a bad body, else the other fields of `Parsed`.
"""

import json
import signal
import struct
import sys
from typing import BinaryIO

from moe_gateway.http.routes import Route
from moe_gateway.request.parsing import MOST_KEYED_BYTES, BadBody, Parsed, parse_body

QUESTION = struct.Struct(">BQ")
ANSWER = struct.Struct(">II")
ROUTES = tuple(Route)


def answer(route: Route, body: bytes) -> bytes:
    """The answer to a question."""
    try:
        parsed = parse_body(route, body, bounds_answer=True)
    except BadBody as error:
        return _frame([str(error), error.param], b"")
    fields = parsed._replace(prompt=b"", prompt_bytes=len(parsed.prompt), media=dict(parsed.media))
    return _frame(list(fields), parsed.prompt[:MOST_KEYED_BYTES])


def _frame(fields: list[object], prompt: bytes) -> bytes:
    head = json.dumps([value if type(value) is not bytes else "" for value in fields]).encode()
    return ANSWER.pack(len(head), len(prompt)) + head + prompt


def read_answer(head: bytes, prompt: bytes) -> Parsed:
    """What an answer says.

    Raises:
        BadBody: the body was a bad one.
    """
    fields = json.loads(head)
    if len(fields) == 2:
        raise BadBody(*fields)
    return Parsed(*fields)._replace(prompt=prompt, keys=None)


def serve(questions: BinaryIO, answers: BinaryIO) -> None:
    """Answers all questions until there are no more."""
    while len(head := questions.read(QUESTION.size)) == QUESTION.size:
        number, length = QUESTION.unpack(head)
        answers.write(answer(ROUTES[number], questions.read(length)))
        answers.flush()


if __name__ == "__main__":
    # A terminal's Ctrl-C is for the gateway, which may still need answers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(sys.stdin.buffer, sys.stdout.buffer)
