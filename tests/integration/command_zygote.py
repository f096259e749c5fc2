"""Runs commands of `queryd` in forks of one process that has imported everything: a fork takes milliseconds, an import
seconds.

Jobs are JSON lines on stdin (`id`, `arguments`, `environment`, `folder`, and `turn`: of one turn only one runs at a
time), answers are JSON lines on stdout (`id`, `code`, `stdout`, `stderr`, `seconds`).
"""

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_AT_ONCE = 16
# Longer than any command may take with a dependency that hangs.
_LONGEST_SECONDS = 90.0
_LOOK_SECONDS = 0.01
_KILLED = -1


def main() -> None:
    import queryd.results  # noqa: PLC0415 — after the path is set
    import service.bucket  # noqa: PLC0415
    import service.cli  # noqa: PLC0415
    import service.doctor  # noqa: PLC0415

    # What a person waits for a server that may still be starting.
    service.bucket._SECONDS = 2.0
    queryd.results._READ_SECONDS = 2
    # It asks no server, and its engine takes two seconds each time.
    service.doctor._examine_sandbox = lambda settings: iter(())
    jobs = [json.loads(line) for line in sys.stdin]
    running: dict[int, tuple[dict[str, Any], Path, float]] = {}
    folder = Path(tempfile.mkdtemp(prefix="queryd-zygote-"))
    while jobs or running:
        while len(running) < _AT_ONCE and (job := _choose(jobs, [each for each, _, _ in running.values()])):
            output = folder / str(job["id"])
            running[_fork(job, output)] = (job, output, time.monotonic())
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            job, output, started = running.pop(pid)
            _report(job, output, os.waitstatus_to_exitcode(status), time.monotonic() - started)
            continue
        for pid, (_, _, started) in running.items():
            if time.monotonic() - started > _LONGEST_SECONDS:
                os.kill(pid, signal.SIGKILL)
        time.sleep(_LOOK_SECONDS)


def _choose(jobs: list[dict[str, Any]], running: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The next one whose turn is nobody else's; it leaves the list."""
    taken = {job["turn"] for job in running if job["turn"] is not None}
    for number, job in enumerate(jobs):
        if job["turn"] not in taken:
            return jobs.pop(number)
    return None


def _fork(job: dict[str, Any], output: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.clear()
        os.environ.update(job["environment"])
        os.chdir(job["folder"])
        sys.argv = ["queryd", *job["arguments"]]
        code = _run()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run() -> int:
    import traceback  # noqa: PLC0415

    from service.cli import main as run_command  # noqa: PLC0415

    try:
        run_command()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001 — as the interpreter would
        traceback.print_exc()
        return 1
    return 0


def _report(job: dict[str, Any], output: Path, code: int, seconds: float) -> None:
    answer = {
        "id": job["id"],
        "code": code,
        "stdout": Path(f"{output}.out").read_text(errors="replace"),
        "stderr": Path(f"{output}.err").read_text(errors="replace"),
        "seconds": seconds,
    }
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
