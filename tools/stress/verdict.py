"""What may become of a clause: it passes, it fails, or it does not apply to this back-end."""

from __future__ import annotations

from enum import StrEnum


class Verdict(StrEnum):
    """The verdict on a back-end in one clause."""

    PASS = "pass"
    FAIL = "fail"
    NOT_APPLICABLE = "not_applicable"


class Failure(AssertionError):
    """The back-end does not do what the clause asks for; the text says what was seen.

    `seed`: with which the clause finds the same at once; None for the seed that it was given.
    """

    def __init__(self, text: str, seed: int | None = None) -> None:
        """Say what was seen."""
        super().__init__(text)
        self.seed = seed


class NotApplicable(Exception):
    """The clause asks for something that this back-end does not offer; the text says what."""
