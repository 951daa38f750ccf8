"""Every error that depthsearch raises on purpose, in one tree.

    DepthsearchError
    ├── InputError               what was asked for can't be done as asked        (exit code 2)
    │   ├── ConfigError          the run file or an override
    │   ├── DataError            calibration or held-out text
    │   ├── ModelError           a model that can't be found, read or used
    │   │   └── UnsupportedModelError   an architecture without a row in the family table
    │   ├── MaskError            a mask that doesn't belong to the space
    │   ├── BudgetError          a budget that is malformed or out of reach
    │   ├── ExportError          a mask that the chosen format can't express
    │   ├── RunDirectoryError    a run directory that exists already, or is not one
    │   ├── JournalError         a journal that is damaged or belongs to another run
    │   └── NothingFoundError    a search that ended without a usable mask on budget
    ├── StorageError             the disk is full, or refuses to be written       (exit code 2)
    └── ClusterError             no worker is left to go on with                  (exit code 2)

The command line prints the message of any of these as one line and ends with `exit_code`; anything
else that reaches it is a defect and keeps its traceback.
"""

from __future__ import annotations

from typing import ClassVar

CONTINUED = (
    "a search continues with `depthsearch resume RUN`, a comparison or a calibration check with "
    "the same command"
)
"""How to go on with what has ended before its time."""


class DepthsearchError(Exception):
    """Root of the tree: catch it to catch everything depthsearch raises on purpose."""

    exit_code: ClassVar[int] = 1
    """What the command line exits with when this error ends a command."""


class InputError(DepthsearchError):
    """Something the caller handed in is wrong, and the message says how to put it right."""

    exit_code: ClassVar[int] = 2


class ConfigError(InputError):
    """The run file or an override is missing, malformed, or holds a value that is not allowed."""


class DataError(InputError):
    """Text could not be found or read, or there is too little of it."""


class ModelError(InputError):
    """A model could not be found, read, or used as it is."""


class UnsupportedModelError(ModelError):
    """No row of the family table fits; the message names the class and what would be needed."""


class MaskError(InputError):
    """A mask has the wrong length, names unknown sites, or drops what the space protects."""


class BudgetError(InputError):
    """A budget is malformed or can't be met; the message names the cheapest reachable cost."""


class ExportError(InputError):
    """A mask can't be written in the chosen format, or the target can't take it."""


class RunDirectoryError(InputError):
    """A run directory exists where a new one is wanted, or is missing or incomplete."""


class JournalError(InputError):
    """A journal is damaged before its last line, or was written by another run or version."""


class NothingFoundError(InputError):
    """No mask on budget could be evaluated within the limits, or all evaluations failed."""


class StorageError(DepthsearchError):
    """The operating system refused a write: disk full, read-only, no permission."""

    exit_code: ClassVar[int] = 2


class ClusterError(DepthsearchError):
    """The cluster can't be reached, or its workers all failed; the run can be resumed."""

    exit_code: ClassVar[int] = 2
