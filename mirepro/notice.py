"""Notice that this process is about to be stopped: given by a signal, answered by a training with a checkpoint.

A handler runs in the middle of a step, where no checkpoint can be written; so it only gives notice.
"""

import signal
from collections.abc import Callable


class Notice:
    """Of one process, as its signals are.

    Attributes:
        given: Whether a checkpoint is wanted now.
        heard: Whether a training has begun, which will answer.
    """

    def __init__(self) -> None:
        self.given = self.heard = False
        self._then: Callable[[], object] | None = None

    def give(self, then: Callable[[], object] | None = None, patience: float = 0.0) -> None:
        """To be called by the handler of a signal, in the main thread.

        Args:
            then: Ends the process, once a checkpoint is written; at once where no training would write one.
            patience: Seconds after which it does so without one.
        """
        self.given = True
        if then is None or self._then is not None:
            return
        self._then = then
        if not self.heard:
            self.answer()
        else:
            signal.signal(signal.SIGALRM, lambda number, frame: self.answer())
            signal.setitimer(signal.ITIMER_REAL, patience)

    def answer(self) -> None:
        """What a training does after each checkpoint: nothing without a notice, else what was to follow it."""
        then, self._then, self.given = self._then, None, False
        if then is not None:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            then()


NOTICE = Notice()
