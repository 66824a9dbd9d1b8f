"""What a benchmark run raises beside the metrics' errors."""

from __future__ import annotations

from genprune.errors import GenpruneError


class BadCandidate(GenpruneError):
    """A candidate's name or specification cannot be read, or no pipeline comes of it."""


class RunMismatch(GenpruneError):
    """A folder holds the images of another run: other prompts, seeds, settings or weights."""


class BadResult(GenpruneError):
    """A result file is damaged, incomplete, or of a newer format."""
