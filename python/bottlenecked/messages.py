"""Errors of other libraries in one sentence."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


def sentence(error: BaseException) -> str:
    """One line, whatever the error brought along."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def loading(what: str) -> Iterator[None]:
    """ValueError, that `what` cannot be loaded, for whatever the libraries that read a model's files raise inside.

    ImportError and MemoryError pass: they are not about the files.
    """
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{what} cannot be loaded: {sentence(error)}") from None


__all__ = ["loading", "sentence"]
