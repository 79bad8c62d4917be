"""What the driver does when a scheduler ends it."""

import os
import signal
from pathlib import Path
from typing import Any

import ray

from pama_plugin.host.preflight.resume import describe_saved


def end_on_sigterm(args: Any) -> None:
    """On SIGTERM say what was saved, end the run's actors, and exit with status 143; Ray's own handler aborts.

    Args:
        args: OpenRLHF's flags, nested.
    """

    def end(*_: Any) -> None:
        saved = describe_saved(Path(args.ckpt.path), with_critic=args.algo.advantage.estimator == "gae")
        print(f"PAMA: ended by SIGTERM; {saved}", flush=True)
        ray.shutdown()
        os._exit(128 + signal.SIGTERM)  # sys.exit within ray.get ends with status 1

    signal.signal(signal.SIGTERM, end)
