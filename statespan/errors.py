"""Errors a user can act on: one line that names the value, the limit and the way out."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The CLI prints its one line without a traceback and exits with 2; nothing has been written."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """An error for a name that does not exist, with the nearest one that does."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names) or 'none'}"
    return UserError(f"no {kind} named {name!r}; {hint}")
