"""The faults of the table, drawn from a seed: each breaks something, waits, and makes it whole again.

A fault holds what it works on, so that no other breaks the same thing meanwhile; different things break together.
"""

import errno
import os
import random
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from confluent_kafka import Consumer, ElectionType, KafkaException
from confluent_kafka.admin import AdminClient

from processes.failpoints import Failpoint
from tests.acceptance.stranger import REQUEST_TOPICS
from tests.faults.cluster import LEASE_SECONDS, SESSION_SECONDS, Cluster, Service, shift_database_clock, together
from tests.faults.evidence import Fault
from tests.faults.load import Load
from tests.faults.s3_proxy import Mode
from tests.servers.kafka_proxy import Trap
from tests.servers.tcp_proxy import TcpProxy

ROWS = range(1, 7)

# A fault begins this often: more than 100 in ten minutes, and most of them overlap with another.
_APART_SECONDS = 4.0
# How many may be under way: with more, nothing works long enough to break.
_AT_ONCE = 6
# Of 25 faults, how many are of each row of the table: the first has 44 kinds, the others four to eight.
_SHARES = {1: 9, 2: 3, 3: 3, 4: 4, 5: 3, 6: 3}
# What is stopped outlives its lease by this, so that its work is somebody else's when it wakes.
_BEYOND_LEASE = (2.0, 6.0)
# The relay's session at the database ends after 10 s of silence: only then is its lock free.
_BEYOND_SESSION = (12.0, 15.0)
# What was broken works for at least half as long as it did not, within these limits, before it is broken again:
# otherwise a slow machine never gets any work done, and there is nothing to break.
_REST, _LONGEST_REST = 2.0, 30.0
# Bytes of the request whose answer the proxy drops after the change. The executor changes a query by one statement,
# which contains its events' headers. The projector sends several statements and a COMMIT.
_CHANGES = {"data": b"traceparent", "state": b"COMMIT"}
# The table's "20 s".
_LONG_SECONDS = 20.0
# The controller misses a broker after its session of 9 s.
_BROKER_SESSION_SECONDS = 12.0
# A failpoint that nobody passes for this long is taken away: no fault then.
_PASS_SECONDS = 10.0
# A service that is not back after this is the next fault's business, and in the end the run's.
_BACK_SECONDS = 60.0
# Replicas catch up within seconds; a starved machine may take its time, and until then the fault has not ended.
_IN_SYNC_SECONDS = 120.0
# The relay's transactions time out after 10 s, which these brokers look for each second.
_BEYOND_TRANSACTION_SECONDS = 12.0
_START_SECONDS = 90.0
_LOOK_SECONDS = 0.05
_HOUR = 3600.0

_CHILD = "engines.duckdb.child"


class NotBack(Exception):
    """Something that was broken on purpose could not be made whole again."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A fault that can be drawn. `targets` are the names of what it works on; `heavy` ones never meet one another, and
    neither do those of a `clock`: two wrong clocks at once are a known limit.

    `act` breaks and mends, and returns what it met, or None when it came to nothing.
    """

    name: str
    row: int
    act: Callable[[random.Random, str], str | None]
    targets: tuple[str, ...]
    heavy: bool = False
    clock: bool = False

    def find_needs(self, target: str) -> set[str]:
        """The names of what the fault holds while it lasts."""
        return {target} | ({"heavy"} if self.heavy else set()) | ({"clock"} if self.clock else set())


class Faults:
    """Draws faults for as long as it is told. Everything is whole again when `run` returns, whatever it raises."""

    def __init__(self, cluster: Cluster, load: Load, seed: str, *, say: Callable[[str], None]) -> None:
        self._cluster = cluster
        self._load = load
        self._seed = seed
        self._say = say
        self._random = random.Random(f"{seed}/faults")
        self._stopping = threading.Event()
        self._held: set[str] = set()
        # What was just broken is left alone for a while: until when, on the monotonic clock.
        self._resting: dict[str, float] = {}
        self._holding = threading.Lock()
        self.recorded: list[Fault] = []
        self.extras: list[Service] = []
        self._extra_numbers = iter(range(1, 10_000))
        # Pids that a fault of ours has stopped: no other may take them for its own.
        self._stopped: set[int] = set()
        self._kinds = [*self._signals(), *self._failpoints(), *self._brokers(), *self._databases(), *self._stores()]
        self._kinds += [*self._machines(), *self._records()]
        self._decks: dict[int, list[Kind]] = {row: [] for row in ROWS}

    @property
    def kinds(self) -> list[Kind]:
        """All kinds that are possible on this machine."""
        return self._kinds

    def stop(self) -> None:
        """Mend what is broken now, and begin nothing more."""
        self._stopping.set()

    def run(self, seconds: float) -> None:
        """Break things for so long; returns once all is whole. Raises `NotBack`, and what a fault itself ran into."""
        end = time.monotonic() + seconds
        under_way: list[Future[None]] = []
        rounds: list[int] = []
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="fault") as pool:
            try:
                number = 0
                while time.monotonic() < end and not self._stopping.is_set():
                    if self._stopping.wait(self._random.uniform(0.6, 1.4) * _APART_SECONDS):
                        break
                    under_way = _check(under_way)
                    if len(under_way) >= _AT_ONCE:
                        continue
                    if not rounds:
                        drawn_from = {kind.row for kind in self._kinds}
                        rounds = [row for row, share in _SHARES.items() if row in drawn_from for _ in range(share)]
                        self._random.shuffle(rounds)
                    drawn = self._draw(rounds)
                    if drawn is None:
                        continue
                    kind, target = drawn
                    number += 1
                    source = random.Random(f"{self._seed}/fault/{number}")
                    under_way.append(pool.submit(self._play, kind, target, source))
            finally:
                if time.monotonic() < end:
                    self._stopping.set()
                for future in under_way:
                    with suppress(Exception):
                        future.result()
                self._release_all()
            _check(under_way)

    def _draw(self, rounds: list[int]) -> tuple[Kind, str] | None:
        """The next kind in turn whose target is free, now held; None when all that is left of the round is not."""
        for place in range(len(rounds) - 1, -1, -1):
            row = rounds[place]
            deck = self._decks[row]
            if not deck:
                deck += [kind for kind in self._kinds if kind.row == row]
                self._random.shuffle(deck)
            for index in range(len(deck) - 1, -1, -1):
                kind = deck[index]
                targets = list(kind.targets)
                self._random.shuffle(targets)
                for target in targets:
                    if self._hold(kind, target):
                        del rounds[place], deck[index]
                        return kind, target
        return None

    def _hold(self, kind: Kind, target: str) -> bool:
        wanted = kind.find_needs(target)
        with self._holding:
            now = time.monotonic()
            if wanted & self._held or any(self._resting.get(name, 0.0) > now for name in wanted):
                return False
            self._held |= wanted
            return True

    def _play(self, kind: Kind, target: str, source: random.Random) -> None:
        started, began = time.time(), time.monotonic()
        try:
            self._say(f"{kind.name} → {target}")
            met = kind.act(source, target)
            if met is None:
                self._say(f"{kind.name} → {target}: came to nothing")
                return
            self.recorded.append(Fault(kind.name, kind.row, met, started, time.time()))
        finally:
            with self._holding:
                held = kind.find_needs(target)
                self._held -= held
                ended = time.monotonic()
                self._resting |= dict.fromkeys(held, ended + min(max(_REST, (ended - began) / 2), _LONGEST_REST))

    def _pause(self, seconds: float) -> None:
        self._stopping.wait(seconds)

    def _until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait for a condition, at most so long; whether it came true. Goes on while the run is being stopped."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                return False
            time.sleep(_LOOK_SECONDS)
        return True

    def _release_all(self) -> None:
        """Nothing stays stopped, shifted or armed."""
        for path in self._cluster.failpoints.iterdir():
            path.unlink(missing_ok=True)
        for pid in self._find_stopped():
            _signal(pid, signal.SIGCONT)

    # Row 1: signals to processes.

    def _names(self, kind: str) -> tuple[str, ...]:
        return tuple(service.name for service in self._cluster.of_kind(kind))

    def _service(self, name: str) -> Service:
        return next(service for service in self._cluster.services if service.name == name)

    def _signals(self) -> Iterator[Kind]:
        for kind in ("executor", "relay", "projector"):
            names = self._names(kind)
            yield Kind(f"SIGKILL {kind}", 1, self._kill_service, names)
            yield Kind(f"SIGTERM {kind}", 1, self._terminate_service, names)
            yield Kind(f"SIGSTOP {kind}", 1, self._stop_service, names)
        executors = self._names("executor")
        for number, name in ((signal.SIGKILL, "SIGKILL"), (signal.SIGTERM, "SIGTERM"), (signal.SIGSTOP, "SIGSTOP")):
            yield Kind(f"{name} child", 1, self._signal_child(_CHILD, number), executors)

    def _kill_service(self, source: random.Random, name: str) -> str | None:
        return self._end_service(source, name, signal.SIGKILL)

    def _terminate_service(self, source: random.Random, name: str) -> str | None:
        if name.startswith("executor"):
            # Some that outlast the drain, to be handed back.
            self._load.provoke("slow", 2)
            self._pause(source.uniform(0.5, 2.0))
        return self._end_service(source, name, signal.SIGTERM)

    def _end_service(self, source: random.Random, name: str, number: signal.Signals) -> str | None:
        service = self._service(name)
        pid, before = service.pid, len(service.endings)
        if pid is None or not _signal(pid, number):
            return None
        self._await_back(service, before)
        return name

    def _await_back(self, service: Service, endings: int) -> None:
        self._until(lambda: len(service.endings) > endings and service.ready, _BACK_SECONDS)

    def _stop_service(self, source: random.Random, name: str) -> str | None:
        pid = self._service(name).pid
        beyond = _BEYOND_SESSION if name.startswith("relay") else _BEYOND_LEASE
        seconds = source.uniform(*beyond) + (0 if name.startswith("relay") else LEASE_SECONDS)
        return name if pid is not None and self._stop_for(pid, seconds) else None

    def _signal_child(self, module: str, number: signal.Signals) -> Callable[[random.Random, str], str | None]:
        def act(source: random.Random, name: str) -> str | None:
            self._load.provoke("slow" if module == _CHILD else "large", 1)
            self._pause(source.uniform(0.1, 1.5))
            pids = self._service(name).children(module)
            if not pids:
                return None
            pid = source.choice(pids)
            if number == signal.SIGSTOP:
                done = self._stop_for(pid, LEASE_SECONDS + source.uniform(*_BEYOND_LEASE))
            else:
                done = _signal(pid, number)
            return f"a {module.split('.')[1]} child of {name}" if done else None

        return act

    def _stop_for(self, pid: int, seconds: float) -> bool:
        self._stopped.add(pid)
        try:
            if not _signal(pid, signal.SIGSTOP):
                return False
            self._pause(seconds)
            _signal(pid, signal.SIGCONT)
            return True
        finally:
            _signal(pid, signal.SIGCONT)
            self._stopped.discard(pid)

    # Row 1 as well: at each named step.

    def _failpoints(self) -> Iterator[Kind]:
        for place in Failpoint:
            yield Kind(f"failpoint {place.value}", 1, self._arm(place), (f"failpoint {place.value}",))

    def _arm(self, place: Failpoint) -> Callable[[random.Random, str], str | None]:
        def act(source: random.Random, _target: str) -> str | None:
            what = "STOP" if source.random() < 0.25 else "KILL"
            endings = self._count_endings()
            armed = self._cluster.failpoints / place.value
            draft = self._cluster.folder / f"{place.value}.draft"
            draft.write_text(what)
            draft.replace(armed)
            self._lure(source, place)
            passed = self._until(lambda: not armed.exists() or self._stopping.is_set(), _PASS_SECONDS)
            with suppress(FileNotFoundError):
                # Nobody has passed, unless somebody does right now.
                armed.unlink()
                return None
            if not passed:
                return None
            if what == "STOP":
                self._wake_after(LEASE_SECONDS + source.uniform(*_BEYOND_LEASE))
            elif not place.value.startswith("child"):
                self._await_one_back(endings)
            return " ".join([what, "by", place.value, *self._find_ended(endings)])

        return act

    def _lure(self, source: random.Random, place: Failpoint) -> None:
        """Send what passes the place, where the ordinary load seldom does."""
        match place:
            case Failpoint.DEAD_LETTER_BEFORE | Failpoint.DEAD_LETTER_AFTER:
                self._load.provoke("malformed", 2)
            case Failpoint.CANCEL_BEFORE | Failpoint.CANCEL_AFTER:
                self._load.provoke("cancel", 2)
            case Failpoint.PUT_AFTER:
                self._load.provoke("large", 2)
            case Failpoint.HAND_BACK_BEFORE:
                self._load.provoke("slow", 6)
                self._pause(source.uniform(1.0, 2.0))
                pid = self._service(source.choice(self._names("executor"))).pid
                if pid is not None:
                    _signal(pid, signal.SIGTERM)
            case _:
                pass

    def _count_endings(self) -> dict[str, int]:
        return {service.name: len(service.endings) for service in self._cluster.services}

    def _find_ended(self, endings: dict[str, int]) -> list[str]:
        """The services that have ended since then."""
        return [each.name for each in self._cluster.services if len(each.endings) > endings[each.name]]

    def _await_one_back(self, endings: dict[str, int]) -> None:
        """Wait until a service has ended since then and is back."""
        services = self._cluster.services
        self._until(
            lambda: any(len(service.endings) > endings[service.name] and service.ready for service in services),
            _BACK_SECONDS,
        )

    def _wake_after(self, seconds: float) -> None:
        """Wake what has stopped itself at a failpoint."""
        self._until(lambda: bool(self._find_stopped()), 2.0)
        mine = [pid for pid in self._find_stopped() if pid not in self._stopped]
        self._stopped |= set(mine)
        self._pause(seconds)
        for pid in mine:
            _signal(pid, signal.SIGCONT)
        self._stopped -= set(mine)

    def _find_stopped(self) -> list[int]:
        found = []
        for service in [*self._cluster.services, *self.extras]:
            for pid in service.processes():
                with suppress(psutil.Error):
                    if psutil.Process(pid).status() == psutil.STATUS_STOPPED:
                        found.append(pid)
        return found

    # Row 2: brokers.

    def _brokers(self) -> Iterator[Kind]:
        # Without brokers nothing else can be broken: that comes once in five times.
        for _ in range(2):
            yield Kind("broker killed", 2, self._kill_broker, ("kafka",))
            yield Kind("leader moved", 2, self._move_leader, ("kafka",))
        yield Kind("all brokers gone", 2, self._kill_all_brokers, ("kafka",), heavy=True)
        yield Kind("EndTxn delayed", 2, self._delay_end_of_transaction, ("EndTxn",))
        yield Kind("EndTxn answer lost", 2, self._lose_end_of_transaction, ("EndTxn",))

    def _kill_broker(self, source: random.Random, _target: str) -> str:
        number = source.randrange(3)
        server = self._cluster.kafka.servers[number]
        server.kill()
        try:
            self._pause(source.uniform(1.0, 8.0))
        finally:
            server.start(_START_SECONDS)
        self._await_in_sync()
        return f"broker {number + 1}"

    def _move_leader(self, source: random.Random, _target: str) -> str | None:
        """A leader stops answering for longer than the controller waits, wakes as one no more, and is elected again."""
        topic = source.choice(list(REQUEST_TOPICS.values()))
        leaders = self._read_leaders(topic)
        if not leaders:
            return None
        node = source.choice(leaders)
        pid = _find_broker(self._cluster.folder / "kafka" / f"node-{node}")
        if pid is None or not self._stop_for(pid, _BROKER_SESSION_SECONDS + source.uniform(0.0, 3.0)):
            return None
        self._await_in_sync()
        return f"broker {node} of {topic}"

    def _kill_all_brokers(self, _source: random.Random, _target: str) -> str:
        servers = self._cluster.kafka.servers
        together([server.kill for server in servers])
        try:
            self._pause(_LONG_SECONDS)
        finally:
            together([lambda server=server: server.start(_START_SECONDS) for server in servers])  # type: ignore[misc]
        self._await_in_sync()
        return "all brokers"

    def _delay_end_of_transaction(self, source: random.Random, _target: str) -> str | None:
        """The request reaches its broker late: when the transaction has timed out, or, where the relay has repeated it
        on another connection, in one of its next transactions."""
        trap = source.choice((Trap.HOLD, Trap.HOLD_AND_CUT))
        caught = self._cluster.relay_proxy.catch(trap)
        try:
            if not self._until(lambda: caught.seen.is_set() or self._stopping.is_set(), _PASS_SECONDS):
                return None
            self._pause(source.uniform(0.2, 5.0) if trap is Trap.HOLD_AND_CUT else _BEYOND_TRANSACTION_SECONDS)
        finally:
            caught.release()
            self._cluster.relay_proxy.disarm()
        return f"the relay, {trap}" if caught.seen.is_set() else None

    def _lose_end_of_transaction(self, _source: random.Random, _target: str) -> str | None:
        caught = self._cluster.relay_proxy.catch(Trap.DROP_ANSWER)
        self._until(lambda: caught.answered.is_set() or self._stopping.is_set(), _PASS_SECONDS)
        self._cluster.relay_proxy.disarm()
        return "the relay" if caught.seen.is_set() else None

    def _admin(self) -> AdminClient:
        # An election's own timeout can't be given: the binding refuses the argument.
        return AdminClient(
            {"bootstrap.servers": self._cluster.kafka.bootstrap, "log_level": 0, "socket.timeout.ms": 5000}
        )

    def _read_leaders(self, topic: str) -> list[int]:
        try:
            partitions = self._admin().list_topics(topic, timeout=5).topics[topic].partitions
        except KafkaException:
            return []
        return [partition.leader for partition in partitions.values() if partition.leader > 0]

    def _await_in_sync(self) -> None:
        """Wait until every replica is back, then give the leaderships back as well, which moves some once more."""
        admin = self._admin()

        def in_sync() -> bool:
            try:
                topics = admin.list_topics(timeout=2).topics.values()
            except KafkaException:
                return False
            partitions = [partition for topic in topics for partition in topic.partitions.values()]
            return all(len(each.isrs) == len(each.replicas) and each.leader > 0 for each in partitions)

        if not self._until(in_sync, _IN_SYNC_SECONDS):
            raise NotBack("the brokers' replicas did not come back")
        with suppress(KafkaException, TimeoutError):
            admin.elect_leaders(ElectionType.PREFERRED).result(10)

    # Row 3: Postgres.

    def _databases(self) -> Iterator[Kind]:
        for name in ("data", "state"):
            yield Kind(f"Postgres {name} killed", 3, self._kill_postgres, (name,))
            yield Kind(f"Postgres {name} cut mid-commit", 3, self._cut_commits, (name,))
            yield Kind(f"Postgres {name} hung", 3, self._hang_postgres, (name,), heavy=name == "data")

    def _proxy(self, name: str) -> TcpProxy:
        return self._cluster.data_proxy if name == "data" else self._cluster.state_proxy

    def _kill_postgres(self, source: random.Random, name: str) -> str:
        server = (self._cluster.data if name == "data" else self._cluster.state).server
        server.kill()
        try:
            self._pause(source.uniform(0.0, 6.0))
        finally:
            server.start(_START_SECONDS)
        return f"Postgres {name}"

    def _cut_commits(self, source: random.Random, name: str) -> str:
        """The server does what it is asked, and nobody hears of it."""
        proxy = self._proxy(name)
        for _ in range(source.randrange(1, 4)):
            if source.random() < 0.5:
                proxy.swallow_answers()
                self._pause(source.uniform(0.05, 1.0))
            else:
                proxy.lose_answer(_CHANGES[name]).wait(2.0)
            proxy.cut()
            self._pause(source.uniform(0.2, 1.0))
        proxy.pass_through()
        return f"Postgres {name}"

    def _hang_postgres(self, source: random.Random, name: str) -> str:
        proxy = self._proxy(name)
        proxy.hang()
        try:
            self._pause(_LONG_SECONDS)
        finally:
            # What was kept back either flows on, or its connections are gone.
            if source.random() < 0.5:
                proxy.pass_through()
            else:
                proxy.cut()
        return f"Postgres {name}"

    # Row 4: S3.

    def _stores(self) -> Iterator[Kind]:
        yield Kind("S3 503", 4, self._store_in(Mode.UNAVAILABLE, (3.0, 10.0)), ("s3",))
        yield Kind("S3 slow", 4, self._store_in(Mode.SLOW, (8.0, 15.0)), ("s3",))
        yield Kind("S3 hung", 4, self._store_in(Mode.HANG, (_LONG_SECONDS, _LONG_SECONDS)), ("s3",), heavy=True)
        yield Kind("S3 cut mid-upload", 4, self._cut_uploads, ("s3",))
        yield Kind("S3 answer lost", 4, self._lose_answers, ("s3",))

    def _store_in(self, mode: Mode, seconds: tuple[float, float]) -> Callable[[random.Random, str], str | None]:
        def act(source: random.Random, _target: str) -> str | None:
            proxy = self._cluster.store_proxy
            self._load.provoke("large", 1)
            proxy.enter(mode)
            try:
                self._pause(source.uniform(*seconds))
            finally:
                proxy.enter(Mode.PASS)
                if source.random() < 0.3:
                    proxy.cut()
            return "S3"

        return act

    def _cut_uploads(self, source: random.Random, _target: str) -> str | None:
        self._cluster.store_proxy.cut_uploads(source.randrange(2, 6), source.choice((0, 50, 300, 5_000_000)))
        return self._await_disarmed()

    def _lose_answers(self, source: random.Random, _target: str) -> str | None:
        self._cluster.store_proxy.lose_answers(source.randrange(1, 5))
        return self._await_disarmed()

    def _await_disarmed(self) -> str | None:
        proxy = self._cluster.store_proxy
        armed = proxy.armed
        self._load.provoke("large", 2)
        self._until(lambda: proxy.armed == 0 or self._stopping.is_set(), _PASS_SECONDS)
        left = proxy.armed
        proxy.enter(Mode.PASS)
        return "S3" if left < armed else None

    # Row 5: the machine.

    def _machines(self) -> Iterator[Kind]:
        executors = self._names("executor")
        if all(_is_small(self._cluster.scratch_of(service)) for service in self._cluster.of_kind("executor")):
            yield Kind("scratch full", 5, self._fill_scratch, executors)
        everybody = tuple(service.name for service in self._cluster.services)
        yield Kind("file descriptors exhausted", 5, self._exhaust_descriptors, everybody)
        yield Kind("clock jump of a worker", 5, self._shift_worker, everybody, clock=True)
        yield Kind("clock jump before an executor's start", 5, self._start_with_wrong_clock, executors, clock=True)
        databases = ("clock of data", "clock of state")
        yield Kind("clock jump of a database", 5, self._shift_database, databases, clock=True)

    def _fill_scratch(self, source: random.Random, name: str) -> str:
        filler = self._cluster.scratch_of(self._service(name)) / "filler"
        try:
            self._load.provoke("large", 2)
            end = time.monotonic() + source.uniform(4.0, 9.0)
            while time.monotonic() < end and not self._stopping.is_set():
                _fill(filler)
                self._pause(0.2)
        finally:
            filler.unlink(missing_ok=True)
        return f"scratch of {name}"

    def _exhaust_descriptors(self, source: random.Random, name: str) -> str | None:
        pids = self._service(name).processes()
        if not pids:
            return None
        # The service itself as often as one of its children.
        pid = pids[0] if source.random() < 0.5 else source.choice(pids)
        try:
            before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            used = max(int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir()) + 1
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (min(used + source.randrange(3), before[1]), before[1]))
        except (OSError, ValueError):
            # It has just ended.
            return None
        self._load.provoke("large", 1)
        try:
            self._pause(source.uniform(4.0, 9.0))
        finally:
            with suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        return f"a process of {name}"

    def _shift_worker(self, source: random.Random, name: str) -> str:
        service = self._service(name)
        with _shifted(source, service.shift_clock) as hours:
            self._pause(source.uniform(8.0, 15.0))
        return f"{name} by {hours:+} h"

    def _start_with_wrong_clock(self, source: random.Random, name: str) -> str | None:
        """It has never known another clock of its own."""
        with _shifted(source, self._service(name).shift_clock) as hours:
            if self._end_service(source, name, signal.SIGKILL) is None:
                return None
            self._pause(source.uniform(8.0, 15.0))
        return f"{name} by {hours:+} h"

    def _shift_database(self, source: random.Random, target: str) -> str:
        name = target.removeprefix("clock of ")
        url = self._cluster.place.data_url if name == "data" else self._cluster.place.state_url

        def shift(seconds: float) -> None:
            # The server may be away by another fault's doing.
            done = self._until(lambda: _try_to_shift(url, seconds), _START_SECONDS)
            if not done:
                raise NotBack(f"the clock of Postgres {name} could not be set")

        with _shifted(source, shift) as hours:
            self._pause(source.uniform(8.0, 15.0))
        return f"Postgres {name} by {hours:+} h"

    # Row 6: records and members.

    def _records(self) -> Iterator[Kind]:
        yield Kind("duplicates", 6, self._burst((("duplicate", 25),)), ("burst of duplicates",))
        yield Kind("reordered", 6, self._burst((("reordered", 15),)), ("burst of reordered",))
        yield Kind("malformed", 6, self._burst((("malformed", 12), ("conflict", 3))), ("burst of malformed",))
        yield Kind("rebalance storm", 6, self._storm, ("members",))

    def _burst(self, wishes: tuple[tuple[str, int], ...]) -> Callable[[random.Random, str], str | None]:
        def act(_source: random.Random, _target: str) -> str | None:
            for what, count in wishes:
                self._load.provoke(what, count)
            # They are sent within a poll of the load's loop.
            self._pause(1.0)
            return "both lanes"

        return act

    def _storm(self, source: random.Random, _target: str) -> str:
        if source.random() < 0.5:
            for _ in range(source.randrange(3, 6)):
                self._join_and_leave(source.uniform(1.0, 3.0))
            return "a silent member"
        others = [self._run_another_executor(source.uniform(2.0, 6.0)) for _ in range(2)]
        return " and ".join(others)

    def _join_and_leave(self, seconds: float) -> None:
        """A member that takes its partitions, does nothing for them, and leaves."""
        consumer = Consumer(
            {
                "bootstrap.servers": self._cluster.kafka.bootstrap,
                "group.id": "queryd-executor",
                "partition.assignment.strategy": "cooperative-sticky",
                "session.timeout.ms": SESSION_SECONDS * 1000,
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "log_level": 0,
            }
        )
        try:
            consumer.subscribe(list(REQUEST_TOPICS.values()))
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                consumer.poll(0.1)
        finally:
            consumer.close()
        self._pause(0.5)

    def _run_another_executor(self, seconds: float) -> str:
        service = self._cluster.make_service(f"executor-extra-{next(self._extra_numbers)}", "executor")
        self.extras.append(service)
        service.start()
        try:
            self._until(lambda: service.ready or self._stopping.is_set(), _BACK_SECONDS)
            self._pause(seconds)
        finally:
            service.stop()
        return service.name


@contextmanager
def _shifted(source: random.Random, shift: Callable[[float], None]) -> Iterator[int]:
    """A clock an hour ahead or behind; the hours."""
    hours = source.choice((-1, 1))
    with ExitStack() as stack:
        stack.callback(shift, 0.0)
        shift(hours * _HOUR)
        yield hours


def _try_to_shift(url: str, seconds: float) -> bool:
    # The server's own words are no matter here: it is asked again.
    with suppress(Exception):
        shift_database_clock(url, seconds)
        return True
    return False


def _check(futures: list[Future[None]]) -> list[Future[None]]:
    """Those that are still under way; raises what one that ended ran into."""
    for future in futures:
        if future.done():
            future.result()
    return [future for future in futures if not future.done()]


def _signal(pid: int, number: signal.Signals) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _find_broker(folder: Path) -> int | None:
    """The JVM that runs in a node's folder."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if process.name() == "java" and Path(process.cwd()) == folder:
                return int(process.pid)
    return None


# Larger file systems are somebody else's as well.
_SMALL_BYTES = 2 << 30


def _is_small(folder: Path) -> bool:
    """True when the folder is a file system of its own that may be filled."""
    found = os.statvfs(folder)
    return folder.is_mount() and found.f_blocks * found.f_frsize <= _SMALL_BYTES


def _fill(filler: Path) -> None:
    """Write until nothing more fits."""
    block = bytes(1 << 20)
    size = len(block)
    with filler.open("ab", buffering=0) as file:
        while size:
            try:
                if file.write(block[:size]) < size:
                    size //= 2
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                size //= 2
