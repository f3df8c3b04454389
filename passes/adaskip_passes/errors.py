"""Every error that adaskip raises, in one tree.

::

    AdaSkipError (Exception)
    ├── OptionError (ValueError)            an unknown option, or a value that it cannot take
    ├── PlanError (ValueError)              a plan that cannot be used
    │   ├── UnknownSublayerError            it names a sublayer that the model or graph lacks
    │   └── LegalityError                   a stateful sublayer would run after it had been skipped
    ├── ProfileError (ValueError)           measurements that are unusable or do not fit together
    ├── FileError (ValueError)              a file that cannot be read or written as what was asked for
    │   ├── MissingFileError (FileNotFoundError)   there is no such file
    │   ├── DamagedFileError                truncated, edited, or not what its checksum says
    │   ├── NewerFileError                  written by a newer adaskip-compile
    │   └── ForeignFileError                made for another model
    ├── CaptureError (RuntimeError)         a model could not be captured, or holds nothing to analyse
    └── PassError (RuntimeError)            a pass could not do what it was told
        └── VerificationError               a pass left a graph that breaks the rules

Messages name the option, sublayer, file, pass or node at fault, and the remedy. Catch ``AdaSkipError`` for all of
them, or the built-in type in brackets where code must not depend on this package.
"""

from __future__ import annotations


class AdaSkipError(Exception):
    """Root of the tree: every error that adaskip raises on purpose."""


class OptionError(AdaSkipError, ValueError):
    """An unknown option, or an option with a value that it cannot take."""


class PlanError(AdaSkipError, ValueError):
    """A skip plan that cannot be built or used."""


class UnknownSublayerError(PlanError):
    """A plan names a sublayer that the model or graph lacks; the message lists those it has."""


class LegalityError(PlanError):
    """A stateful sublayer would run after it had been skipped, with a hole in its cache."""


class ProfileError(AdaSkipError, ValueError):
    """Measurements that are unusable, or profiles that do not fit together."""


class FileError(AdaSkipError, ValueError):
    """A file cannot be read or written as the kind of file that was asked for."""


class MissingFileError(FileError, FileNotFoundError):
    """There is no file of the given name."""


class DamagedFileError(FileError):
    """A file is truncated, was edited, or does not hold what its checksum says."""


class NewerFileError(FileError):
    """A file was written by a newer version of adaskip-compile than the one installed."""


class ForeignFileError(FileError):
    """A profile or plan was made for another model."""


class CaptureError(AdaSkipError, RuntimeError):
    """A model could not be captured as a graph, or the graph holds nothing to analyse."""


class PassError(AdaSkipError, RuntimeError):
    """A pass could not do what it was told to do."""


class VerificationError(PassError):
    """A graph breaks the rules that hold before and after every pass."""
