"""Records → conversations: what a row of a source says, or why it cannot be used.

sources.py reads the rows. A record that cannot be used is reported with its file and line, never dropped in silence.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from vtmix.settings import Source

ROLES = ("system", "user", "assistant")


class Turn(NamedTuple):
    """One message of a conversation."""

    role: str
    content: str


Conversation = tuple[Turn, ...]


class BadRecord(NamedTuple):
    """A record that cannot be used: where it stands, and why."""

    where: str
    why: str


class Invalid(ValueError):
    """Says why a record cannot be used."""


def conversation(row: Any, source: Source) -> Conversation:
    """The conversation a record holds: its `messages` field, or else its prompt and response fields.

    Raises Invalid saying what was found and what was expected.
    """
    if not isinstance(row, Mapping):
        raise Invalid(f"expected an object with fields, found {_kind(row)}")
    if row.get(source.messages) is not None:
        return _chat(row[source.messages], source.messages)
    missing = [field for field in (source.prompt, source.response) if row.get(field) is None]
    if missing:
        raise Invalid(
            f"no field {' and '.join(map(repr, missing))} (nor {source.messages!r}): found {_fields(row)}; "
            "name the fields in the source's settings"
        )
    return (
        Turn("user", _text(row[source.prompt], source.prompt)),
        Turn("assistant", _text(row[source.response], source.response)),
    )


def sample_id(turns: Conversation) -> str:
    """32 hex digits derived from a conversation's content alone: equal content is an exact duplicate."""
    data = json.dumps(turns, ensure_ascii=False, separators=(",", ":")).encode()
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def text_of(turns: Conversation) -> str:
    """What a conversation says, without its roles."""
    return "\n".join(turn.content for turn in turns if turn.role != "system")


def _chat(messages: Any, field: str) -> Conversation:
    if not isinstance(messages, (list, tuple)):
        raise Invalid(f"{field!r} is {_kind(messages)}, expected a list of {{role, content}}")
    turns = tuple(_turn(message, f"{field}[{number}]") for number, message in enumerate(messages))
    if not any(turn.role == "assistant" for turn in turns):
        raise Invalid(f"{field!r} has no assistant turn, so there is nothing to learn from")
    return turns


def _turn(message: Any, field: str) -> Turn:
    if not isinstance(message, Mapping):
        raise Invalid(f"{field!r} is {_kind(message)}, expected {{role, content}}")
    if "role" not in message or "content" not in message:
        raise Invalid(f"{field!r} has the fields {_fields(message)}, expected 'role' and 'content'")
    if message["role"] not in ROLES:
        raise Invalid(f"{field!r} has role {message['role']!r}, expected one of {', '.join(ROLES)}")
    return Turn(message["role"], _text(message["content"], f"{field}.content"))


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise Invalid(f"{name!r} is {_kind(value)}, expected text")
    if not value.strip():
        raise Invalid(f"{name!r} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Invalid(f"{name!r} holds a lone surrogate at character {error.start}, which UTF-8 cannot carry") from None
    return value


def _fields(row: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, row)) or "none"


def _kind(value: Any) -> str:
    names = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        bytes: "bytes",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), f"a {type(value).__name__}")
