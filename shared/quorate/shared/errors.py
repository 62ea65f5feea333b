"""The error tree of Quorate. Every message says what is wrong, where, and what to do.

    QuorateError                 exit 1   anything Quorate raises on purpose
    ├── BadInput                 exit 2   the person who started the command can mend it
    │   ├── ConfigError                   run file, sites file or override
    │   ├── DataError                     a data file, a row, a label
    │   ├── ModelError                    base model, tokenizer, adapter targets
    │   ├── AdapterError                  arrays whose names, shapes or values are wrong
    │   │   └── NonFiniteUpdate           NaN or infinity in an array
    │   ├── CheckpointError               a checkpoint that is damaged or of another run
    │   ├── ProtocolError                 a message that does not parse or does not belong
    │   ├── OutputError                   the output folder cannot be used or written
    │   └── LedgerError                   a site's privacy ledger that is not what was written
    ├── RequestRefused           exit 1   a site says no to a request (policy, wrong run)
    ├── NotReady                 exit 1   a full disk, a certificate at its end, the other end not there
    ├── AuditMissing             exit 1   an adapter was not audited, or its claim is refuted
    ├── QuorumNotMet             exit 3   a round had too few good updates
    └── ModelDiverged            exit 4   no site can measure the model: its figures are not finite

An error that crosses from a site to the coordinator carries `code` alone, never its text or its `kind`: the
text may quote a patient's record. `kind` says which check refused, in a word that stays when sentences
change; it is for whoever handles errors by program, tests among them.
"""

from __future__ import annotations

from typing import ClassVar


class QuorateError(Exception):
    """Base class: `code` is what may leave a site, `exit_code` what the command line returns.

    Args:
        message: where it is, what is wrong, what to do: "rows.csv:7: the label is empty; ...".
        kind: which check refused ("empty-label"), where one of the class is to be told from the others.
    """

    code: str = "error"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str = "", *, kind: str | None = None) -> None:
        super().__init__(message)
        self.kind = kind

    @property
    def where(self) -> str:
        """The file, line or field that the message begins with; empty where it names none."""
        where, colon, _ = str(self).partition(": ")
        return where if colon else ""


class BadInput(QuorateError):
    """Input that the person who started the command can mend."""

    code = "bad-input"
    exit_code = 2


class ConfigError(BadInput):
    """A run file, sites file or override that does not validate."""

    code = "config"


class DataError(BadInput):
    """Data that cannot be read or do not fit the run's task and labels."""

    code = "data"


class ModelError(BadInput):
    """A base model that cannot be found, verified, loaded or adapted as asked."""

    code = "model"


class AdapterError(BadInput):
    """Adapter arrays whose names, shapes or dtypes are not the expected ones."""

    code = "adapter"


class NonFiniteUpdate(AdapterError):
    """An array that holds NaN or infinity."""

    code = "non-finite"


class CheckpointError(BadInput):
    """A checkpoint that is damaged, edited, or belongs to another run."""

    code = "checkpoint"


class ProtocolError(BadInput):
    """A message that does not parse, or that answers another question."""

    code = "protocol"


class OutputError(BadInput):
    """An output folder that cannot be used or written."""

    code = "output"


class LedgerError(BadInput):
    """A privacy ledger that was edited, cut short, or is older than what was noted of it elsewhere."""

    code = "ledger"


class RequestRefused(QuorateError):
    """A site refuses a request; the reason stays in the site's log.

    Args:
        reason: rule, value and remedy, for the site's own log.
        code: which kind of rule said no; this is all that the coordinator learns.
        kind: as of any error.
    """

    code = "refused"

    def __init__(self, reason: str, *, code: str = "refused", kind: str | None = None) -> None:
        super().__init__(reason, kind=kind)
        self.code = code


class NotReady(QuorateError):
    """A machine, a network or the other end that is in no state for the next round."""

    code = "not-ready"


class AuditMissing(QuorateError):
    """An adapter that was to be let out only after an audit was not audited, or its claim was refuted."""

    code = "audit"


class QuorumNotMet(QuorateError):
    """Fewer sites than the quorum returned a good update."""

    code = "quorum"
    exit_code = 3


class ModelDiverged(QuorateError):
    """The model of a round gives no site finite figures: training diverged, or an update was poisoned."""

    code = "diverged"
    exit_code = 4
