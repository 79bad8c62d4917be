"""Ends processes that would outlive the one that started them."""

import subprocess
from contextlib import suppress
from pathlib import Path


def end_with_this_process(pids: list[int]) -> "subprocess.Popen[bytes]":
    """Kill vLLM's processes when this one ends, however it ends. Keep the result for as long.

    They end by themselves unless their parent is killed, by Ray or for want of memory: then they would keep their
    memory, on a GPU too. A shell waits for the end of this process, which closes the pipe between them.
    """
    started = []
    for pid in pids:
        with suppress(OSError):  # it has ended, as helpers of a compiler do
            stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            started.append(f"{pid}:{stat[19]}")  # with its start time, because a process id may be used again
    script = (
        f"cat; for each in {' '.join(started)}; do pid=${{each%:*}}; stat=$(cat /proc/$pid/stat) && "
        'set -- ${stat##*) } && [ "${20}" = "${each#*:}" ] && kill -KILL $pid; done'
    )
    return subprocess.Popen(
        ["sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # else a signal to the group of this process would end the shell, too
    )
