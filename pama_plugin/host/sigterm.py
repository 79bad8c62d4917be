"""What the driver does when a scheduler ends it."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

from pama_plugin.host.preflight.resume import describe_saved

GRACE = 20.0  # seconds for the file system and for Ray


def end_on_sigterm(args: Any) -> None:
    """On SIGTERM say what was saved, end the run's actors, and exit with status 143; Ray's own handler aborts.

    Args:
        args: OpenRLHF's flags, nested.
    """
    import ray

    def end(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would wait for locks that this one holds
        at_the_latest = threading.Timer(GRACE, os._exit, (128 + signal.SIGTERM,))
        at_the_latest.daemon = True
        at_the_latest.start()
        try:
            saved = describe_saved(Path(args.ckpt.path), with_critic=args.algo.advantage.estimator == "gae")
            # Not print, which fails if the signal came while this thread was printing.
            os.write(1, f"PAMA: ended by SIGTERM; {saved}\n".encode())  # fails if nobody reads any more
        finally:
            try:
                ray.shutdown()
            finally:
                os._exit(128 + signal.SIGTERM)  # sys.exit within ray.get ends with status 1

    signal.signal(signal.SIGTERM, end)
