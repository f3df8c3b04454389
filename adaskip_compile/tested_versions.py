"""Which versions of what we build on were tested, for errors about what is not as it was there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

from adaskip_passes.errors import CaptureError

# docs/support.md says what was run on each.
TESTED = {"torch": ("2.11.0", "2.13.0", "2.14.1"), "transformers": ("5.17.0", "5.23.0", "5.24.0")}


@contextmanager
def internals_of(library: str, purpose: str) -> Iterator[None]:
    """Have what is missing of ``library``'s internals within this context be an error that names versions.

    Raises:
        CaptureError: An import, or a look-up of an attribute, found nothing.
    """
    try:
        yield
    except (ImportError, AttributeError) as error:
        tested = TESTED[library]
        raise CaptureError(
            f"{purpose} needs what {library} {metadata.version(library)}, which is installed, does not have where it is looked "
            f"for ({error}); tested are {', '.join(tested)}: pip install '{library}=={tested[-1]}'"
        ) from error
