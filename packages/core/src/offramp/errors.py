"""Every error a user can catch: one family, and each message says what was given, what exists and the line to write."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OfframpError(Exception):
    """Base of every error raised by offramp."""


class BadArgument(OfframpError, ValueError):
    """An argument is outside its range or does not fit the model it is used with."""


class UnknownName(BadArgument):
    """A name (policy, head, loss, calibrator, option) is not registered."""


class UnsupportedModel(OfframpError, TypeError):
    """No plugin claims the model, two do, or its structure is not understood; nothing was changed."""


class NotAttached(OfframpError, RuntimeError):
    """The model has no exits attached, or is in the wrong state for what was asked."""


class DamagedFile(OfframpError, ValueError):
    """A file is missing, truncated, tampered with, of a newer format, or written for another model."""


class CompileFailed(OfframpError, RuntimeError):
    """A compiler that was there could not compile a block."""


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """Return `` did you mean 'x'? Known: a, b, c`` for an unknown name."""
    names = sorted(known)
    near = difflib.get_close_matches(str(given), names, n=1)
    hint = f" did you mean {near[0]!r}?" if near else ""
    return f"{hint} Known: {', '.join(names) or 'none'}"


def check_options(given: Iterable[str], known: Iterable[str], owner: str) -> None:
    """Raise `UnknownName` when an option in `given` is not one of `known`; `owner` names who takes them."""
    known = list(known)
    for name in given:
        if name not in known:
            raise UnknownName(f"{owner} has no option {name!r};{did_you_mean(name, known)}")
