"""`make faults SECONDS=120 SEED=…`: break everything under load, then let the checker judge what is left.

Prints the seed first and one line `faults: seed=… queries=… faults=… violations=…` last; exits 1 on any violation. The
folder of a run with violations stays and is named; that of a run without goes.
"""

import argparse
import ctypes
import os
import secrets
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import psycopg

from service.embedded.servers import Lifeline
from tests.faults.checker import Verdict, judge
from tests.faults.cluster import LEASE_SECONDS, Cluster, remove_folder
from tests.faults.crashes import allow_crashes, read_starts
from tests.faults.evidence import Evidence, SentQuery
from tests.faults.faults import ROWS, Faults
from tests.faults.load import RATE, Load

# The load comes first for a moment, so that the first fault meets something.
_WARM_SECONDS = 3.0
# The brokers are back by then, and what the load has sent is acknowledged.
_ACKNOWLEDGED_SECONDS = 60.0
# I1's own limit is 60 s at most; what is not quiet by then is the checker's to name.
_QUIET_SECONDS = 75.0
# More unfinished queries than this would not be worked off in I1's time: the load waits until there are fewer.
_MOST_OPEN = 200
_LOOK_SECONDS = 0.5
_SAY_SECONDS = 15.0
# The database is there or it is not; a starved machine may need some time to say so.
_ANSWER_SECONDS = 10
# The sweep leaves alone what may still belong to a live attempt: twice the lease, and a moment.
_SWEPT_AFTER = 2 * LEASE_SECONDS + 1.0
# Everything hangs on the lifeline and is killed by its end.
_GONE_SECONDS = 20.0
# Each executor's scratch, where it can be a file system of its own: room for the large results of its slots.
_SCRATCH_BYTES = 768 << 20

# From <sched.h>, <sys/mount.h>.
_CLONE_NEWNS, _CLONE_NEWUSER = 0x0002_0000, 0x1000_0000
_MS_REC, _MS_PRIVATE, _MNT_DETACH = 0x4000, 0x4_0000, 2


@dataclass(slots=True)
class Run:
    """What one run has to tell beside the verdict. `troubles` are violations that the harness itself has met."""

    seed: str
    seconds: float
    troubles: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        """One line of progress, with the seconds since the start."""
        print(f"{time.monotonic() - self.started:7.1f}  {text}", flush=True)


def main() -> None:
    """Run what the command line asks for; exits 0, 1 on violations, 130 when interrupted."""
    arguments = _parse()
    seed = arguments.seed or secrets.token_hex(4)
    print(f"faults: seed={seed} seconds={arguments.seconds:.0f}", flush=True)
    signal.signal(signal.SIGTERM, _interrupt)
    folder = Path(tempfile.mkdtemp(prefix="queryd-faults-")).resolve()
    # Postgres runs as another user where we are root.
    folder.chmod(0o755)
    run = Run(seed, arguments.seconds)
    try:
        # Before any thread, for a thread keeps the name space that it was born in.
        own_mounts = enter_own_mounts()
        if not own_mounts:
            run.notes.append("no name space of our own: `scratch full` is left out")
        failed = _play(run, folder, arguments, own_mounts=own_mounts)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        _remove(folder)
        sys.exit(130)
    except BaseException:
        print(f"the run itself failed; its folder is {folder}", file=sys.stderr)
        raise
    if failed or arguments.keep:
        print(f"the logs and the evidence are in {folder}")
        _release_mounts(folder)
    else:
        _remove(folder)
    sys.exit(1 if failed else 0)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make faults", description="Break everything under load, then judge.")
    parser.add_argument("--seconds", type=float, default=120.0, help="how long faults are made")
    parser.add_argument("--seed", default="", help="repeats a run's draws; a fresh one is printed otherwise")
    parser.add_argument("--rate", type=float, default=RATE, help="requests a second")
    parser.add_argument("--executors", type=int, default=2)
    parser.add_argument("--only", default="", help="only kinds of faults with this in their names")
    parser.add_argument("--keep", action="store_true", help="keep the folder of a run without violations, too")
    return parser.parse_args()


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _play(run: Run, folder: Path, arguments: argparse.Namespace, *, own_mounts: bool) -> bool:
    """One run from start to verdict; whether there were violations."""
    with ExitStack() as stack:
        lifeline = stack.enter_context(Lifeline())
        stack.enter_context(_nobody_left(lifeline))
        cluster = Cluster(folder, lifeline, executors=arguments.executors)
        stack.callback(cluster.abandon)
        if own_mounts:
            for number in range(1, arguments.executors + 1):
                mount_scratch(folder / "scratch" / f"executor-{number}")
        load = Load(cluster, run.seed, arguments.rate)
        run.say("starting three brokers, two Postgres, S3 and the services")
        cluster.start()
        load.prepare(run.seconds)
        faults = Faults(cluster, load, run.seed, say=run.say)
        if arguments.only:
            faults.kinds[:] = [kind for kind in faults.kinds if arguments.only in kind.name]
        _break(run, cluster, load, faults)
        _settle(run, cluster, load)
        verdict, queries = _judge(run, cluster, load, faults)
        _report(run, cluster, faults, verdict, queries)
        violations = len(verdict.violations) + len(run.troubles)
        print(
            f"faults: seed={run.seed} queries={len(queries)} faults={len(faults.recorded)} violations={violations}",
            flush=True,
        )
        cluster.stop()
        return violations > 0


@contextmanager
def _nobody_left(lifeline: Lifeline) -> Iterator[None]:
    """However the block ends, every process below this one has ended after it."""
    try:
        yield
    finally:
        lifeline.close()
        _, left = psutil.wait_procs(psutil.Process().children(), timeout=_GONE_SECONDS)
        for process in left:
            with suppress(psutil.Error):
                process.kill()


def _break(run: Run, cluster: Cluster, load: Load, faults: Faults) -> None:
    """Load and faults together, for as long as was asked for."""
    run.say("everything is ready; the load begins")
    load.start()
    time.sleep(_WARM_SECONDS)
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(run, cluster, load, faults, ended), daemon=True)
    watcher.start()
    try:
        faults.run(run.seconds)
    # A fault that could not be mended, or met what nobody had thought of, is a violation: the verdict still counts.
    except Exception as error:  # noqa: BLE001
        run.troubles.append(f"a fault failed: {type(error).__name__}: {error}")
    finally:
        faults.stop()
        ended.set()
        watcher.join()


def _watch(run: Run, cluster: Cluster, load: Load, faults: Faults, ended: threading.Event) -> None:
    """Say how it goes, and hold the load back while the service is too far behind."""
    upcoming = 0.0
    while not ended.wait(_LOOK_SECONDS):
        terminal = _count_terminal(cluster)
        if terminal is None:
            continue
        behind = load.accepted - terminal
        if behind > _MOST_OPEN:
            load.held.set()
        elif behind < _MOST_OPEN // 2:
            load.held.clear()
        if time.monotonic() >= upcoming:
            upcoming = time.monotonic() + _SAY_SECONDS
            held = ", the load is held" if load.held.is_set() else ""
            for service in cluster.services:
                service.scrape()
            run.say(f"{load.accepted} accepted, {terminal} terminal, {len(faults.recorded)} faults{held}")
    load.held.clear()


_TERMINAL = "SELECT count(*) FROM query_results WHERE status IN ('Succeeded', 'Failed')"
_OPEN = "SELECT count(*) FROM query_results WHERE status NOT IN ('Succeeded', 'Failed')"
_WAITING = "SELECT count(*) FROM outbox"
_PROJECTED = "SELECT count(*) FROM query_status WHERE status IN ('Succeeded', 'Failed')"


def _count_terminal(cluster: Cluster) -> int | None:
    """How many queries have ended; None while the database is away."""
    try:
        return _ask(cluster.place.data_url, _TERMINAL)
    except psycopg.OperationalError:
        return None


def _ask(url: str, statement: str) -> int:
    with psycopg.connect(url, connect_timeout=_ANSWER_SECONDS) as connection:
        row = connection.execute(statement.encode()).fetchone()
    assert row is not None
    return int(row[0])


def _settle(run: Run, cluster: Cluster, load: Load) -> None:
    """No more faults and no more load: wait until it is quiet, sweep, and end the services in order."""
    run.say("no more faults; waiting for the load's last acknowledgements")
    load.stop(_ACKNOWLEDGED_SECONDS)
    wanted = load.accepted + len({bad.answered_id for bad in load.malformed if bad.answered_id is not None})
    began = time.monotonic()
    while not _is_quiet(cluster, wanted):
        if time.monotonic() - began > _QUIET_SECONDS:
            run.troubles.append(f"it is not quiet {_QUIET_SECONDS:.0f} s after the last fault: {_describe(cluster)}")
            break
        time.sleep(_LOOK_SECONDS)
    run.say(f"quiet after {time.monotonic() - began:.1f} s; sweeping")
    time.sleep(_SWEPT_AFTER)
    if "retention" not in cluster.queryd("--help"):
        run.notes.append("there is no `queryd retention` yet: nothing was swept")
        cluster.stop_services()
        return
    for folder in cluster.scratch:
        cluster.queryd("retention", environment={"QUERYD_SCRATCH": str(folder)})
    for name, code in cluster.stop_services().items():
        if code != 0:
            run.troubles.append(f"{name} ended with {code} on SIGTERM")


def _is_quiet(cluster: Cluster, wanted: int) -> bool:
    place = cluster.place
    try:
        terminal = _ask(place.data_url, _TERMINAL)
        return (
            terminal >= wanted
            and _ask(place.data_url, _OPEN) == 0
            and _ask(place.data_url, _WAITING) == 0
            and _ask(place.state_url, _PROJECTED) == terminal
        )
    except psycopg.OperationalError:
        return False


def _describe(cluster: Cluster) -> str:
    place = cluster.place
    return (
        f"{_ask(place.data_url, _TERMINAL)} terminal, {_ask(place.data_url, _OPEN)} open, "
        f"{_ask(place.data_url, _WAITING)} in the outbox, {_ask(place.state_url, _PROJECTED)} projected"
    )


def _judge(run: Run, cluster: Cluster, load: Load, faults: Faults) -> tuple[Verdict, Sequence[SentQuery]]:
    run.say("judging")
    executors = [*cluster.of_kind("executor"), *faults.extras]
    starts = read_starts({service.name: service.log for service in executors})
    queries = allow_crashes(load.sent, faults.recorded, starts)
    evidence = Evidence(
        place=cluster.place,
        queries=queries,
        malformed=load.malformed,
        faults=tuple(faults.recorded),
        lease_seconds=LEASE_SECONDS,
        logs=(*cluster.logs, *(path for service in faults.extras for path in service.logs)),
        scratch=tuple(cluster.scratch),
    )
    return judge(evidence), queries


def _report(run: Run, cluster: Cluster, faults: Faults, verdict: Verdict, queries: Sequence[SentQuery]) -> None:
    print("\nfaults by kind")
    for (row, kind), count in verdict.faults_by_kind.items():
        print(f"  {row}  {kind:<42} {count:>4}")
    print("faults by row: " + ", ".join(f"{row}: {verdict.faults_by_row.get(row, 0)}" for row in ROWS))
    ended = Counter((ending.service, ending.code) for service in cluster.services for ending in service.endings)
    print(
        "ends of services by exit code: "
        + ", ".join(f"{name} {code} ×{n}" for (name, code), n in sorted(ended.items()))
    )
    counts = verdict.counts
    print(
        f"{len(queries)} queries, {counts.retried} of more than one attempt, {counts.events} events, "
        f"{counts.objects} objects, {counts.dead_letters} dead letters"
    )
    print("ends: " + ", ".join(f"{end} {count}" for end, count in counts.ends.items()))
    print(f"to terminal: longest {verdict.longest_seconds:.1f} s, 99% within {verdict.p99_seconds:.1f} s")
    for note in run.notes:
        print(f"note: {note}")
    for trouble in run.troubles:
        print(f"VIOLATION {trouble}")
    for violation in verdict.violations:
        print(f"VIOLATION {violation}")


# The scratch folders as small file systems, which vanish with the last process that sees them.


def enter_own_mounts() -> bool:
    """Give this process, and all that it starts, mounts of its own; False where the system does not let us."""
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if user == 0:
        if libc.unshare(_CLONE_NEWNS) != 0:
            return False
    else:
        if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS) != 0:
            return False
        # We stay who we are; only mounting is ours now.
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    return bool(libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None) == 0)


def mount_scratch(folder: Path) -> None:
    """A file system of its own in the folder; raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={_SCRATCH_BYTES},mode=755".encode()) != 0:
        raise OSError(ctypes.get_errno(), f"can't mount {folder}")


def _release_mounts(folder: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    for path in (folder / "scratch").glob("*"):
        if path.is_mount():
            libc.umount2(os.fsencode(path), _MNT_DETACH)


def _remove(folder: Path) -> None:
    _release_mounts(folder)
    remove_folder(folder)


if __name__ == "__main__":
    main()
