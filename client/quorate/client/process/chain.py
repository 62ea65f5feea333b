"""What a request passes at a site before anything is trained; its order is written here and nowhere else.

Each link answers one request, by the next link or by a code. The order is the site's safety: a request is
written down before it is judged, judged before any data are read, and a stored answer is found before
anything is spent or trained a second time.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from quorate.client.node.folder import SiteFolder
from quorate.client.policy.answer_store import ANSWERS_FILE, AnswerStore
from quorate.client.policy.limits import WorkLimits
from quorate.client.privacy.budgets import Budgets
from quorate.client.privacy.ledger import DATABASE as LEDGER
from quorate.client.privacy.ledger import HEADS, open_ledger
from quorate.client.privacy.spending_gate import SpendingGate
from quorate.client.process.reload import SiteFileGate
from quorate.client.runs.message_log import MessageRecorder
from quorate.client.runs.run_history import DATABASE as RUNS
from quorate.client.runs.run_history import RunHistory
from quorate.client.site.engine import Engine, OneAtATime
from quorate.client.site.site_data import SiteData
from quorate.shared.errors import BadInput
from quorate.shared.privacy.accounting import epsilon
from quorate.shared.progress import StepEvent
from quorate.shared.protocol.messages import RoundRequest, Update

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chain:
    """The links that somebody outside needs by name; `build_chain` says how they hang together."""

    book: RunHistory
    recorded: MessageRecorder
    limited: WorkLimits
    accounted: SpendingGate
    answered: AnswerStore

    def answer(self, message: RoundRequest) -> Update:
        return self.recorded.answer(message)

    def on_step(self, event: StepEvent) -> None:
        """To be called at every optimiser step and between passes. Raises: RequestRefused: at a limit."""
        self.limited.on_step(event)

    def close(self) -> None:
        """Let go of what is open."""
        self.accounted.close()
        self.answered.close()
        self.book.close()


def build_chain(folder: SiteFolder, at_site: SiteData, engine: Engine) -> Chain:
    """Put a site's word before its engine.

    A request passes links 1 to 7; they are made from the last to the first, as each holds the next.

    Args:
        folder: the site's, as it is when the process starts.
        at_site: what it holds; told when site.yaml has changed, and when a run begins.
    Raises: OutputError: the stored answers, or the book of runs, cannot be opened.
    """
    book = RunHistory(folder.state / RUNS)
    # 7  the engine: what came is held against the run and its base model, then rows are read and trained on.
    train = OneAtATime(engine)
    # 6  stored answers: what was answered once is answered the same, and nothing is trained twice; a new
    #    answer is on disk before it goes back.
    answered = AnswerStore(folder.state / ANSWERS_FILE, train)
    # 5  privacy ledger: what is stored is given again for nothing; all else is paid for before it is trained.
    accounted = SpendingGate(
        lambda: open_ledger(folder),
        lambda: Budgets(at_site.folder.config, at_site.folder.path, epsilon),
        at_site.spending,
        answered,
        write_down=at_site.write_down,
    )
    _look_at_ledger(folder, accounted)
    # 4  limits: how long, how often; rows are read again when a run begins.
    limited = WorkLimits(lambda: at_site.folder.config.policy, book, at_site.forget, accounted)
    # 2  site.yaml as it is at this request, and
    # 3  the policy in it (quorate.client.policy.gate): from the request alone, before any data are read.
    current = SiteFileGate(folder, at_site.use, limited)
    # 1  the message is read once, and written down together with what leaves.
    recorded = MessageRecorder(book, folder.connection, current)
    return Chain(book, recorded, limited, accounted, answered)


def _look_at_ledger(folder: SiteFolder, accounted: SpendingGate) -> None:
    """Open a ledger that is needed or there.

    Where it is not what was written, that is logged, and private runs are refused until it is.
    """
    policy = folder.config.policy
    files = (folder.ledger / LEDGER, folder.anchor / HEADS)
    if policy.require_privacy or policy.privacy_budgets or any(path.exists() for path in files):
        try:
            accounted.open()
        except BadInput as error:
            log.error("%s", error)
