"""What it costs to call a ``py`` function in processes (the default) instead of threads (``isolate=false``).

The event loop calls the function for 256 responses of 4,000 characters at once. Variants take turns; medians of 5.
"""

import asyncio
import platform
import tempfile
import time
from pathlib import Path
from statistics import median

from pama_plugin.rewards import Response
from pama_plugin.rewards.options import PyOptions
from pama_plugin.rewards.processes import Processes
from pama_plugin.rewards.py import load_function

CALLS = 256
FUNCTIONS = {
    "returns at once": "return 1.0",
    "computes for some ms": "return float(sum(i * i for i in range(200_000)))",
    "waits for 50 ms": "time.sleep(0.05); return 1.0",
}
RESPONSE = Response(4_000 * "x", "", "", "", 1)


async def measure(location: str, isolate: bool) -> tuple[float, float]:
    """Seconds of the first call, with the start of the process, and of the calls after it."""
    start = time.perf_counter()
    score = load_function(location, PyOptions(isolate=isolate))
    await score(RESPONSE)
    ready = time.perf_counter()
    await asyncio.gather(*(score(RESPONSE) for _ in range(CALLS)))
    return ready - start, time.perf_counter() - ready


def main() -> None:
    print(f"{CALLS} calls, 16 at once; {platform.machine()}, Python {platform.python_version()}")
    print(f"{'function':<22}{'threads ms/call':>17}{'processes ms/call':>19}{'first call ms':>15}{'MB/process':>12}")
    for name, body in FUNCTIONS.items():
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rewards.py"
            file.write_text(f"import time\ndef f(queries, prompts, labels):\n    {body}\n")
            rows = [[asyncio.run(measure(f"{file}:f", isolate)) for isolate in (False, True)] for _ in range(5)]
            megabytes = Processes(str(file), "f", 1, 1.0).idle.get_nowait().megabytes
        threads, processes = (median(row[variant][1] for row in rows) / CALLS * 1e3 for variant in (0, 1))
        first = median(row[1][0] for row in rows) * 1e3
        print(f"{name:<22}{threads:>17.3f}{processes:>19.3f}{first:>15.0f}{megabytes:>12}")


if __name__ == "__main__":
    main()
