"""What a feed hands out, and what its commit covers, without a broker."""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from queryd import StatusFeed
from queryd import feed as feeds
from queryd.codec import encode
from queryd.events import Topic
from queryd.kafka.record import Record
from tests.unit.samples import QUERY_ID, make_status


class _Subscription:
    """One record, and what was finished of it."""

    finished: list[Record]

    def __init__(self, _config: dict[str, Any], _topics: list[str], **_: Any) -> None:
        key, value = QUERY_ID.encode(), encode(make_status())
        self._left = [Record(Topic.STATUS, 0, 7, key, value, (), None, False, 0.0, 1)]

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def commit(self) -> None: ...

    async def poll(self) -> list[Record]:
        await asyncio.sleep(0)
        records, self._left = self._left, []
        return records

    def owns(self, _record: Record) -> bool:
        return True

    def finish(self, record: Record) -> None:
        self.finished.append(record)


class _Interrupted:
    """A wait that Ctrl-C ends just when what it waited for is there."""

    def __init__(self, running: "Future[Any]") -> None:
        self._running = running

    def result(self) -> None:
        self._running.result(10)
        raise KeyboardInterrupt

    def cancel(self) -> bool:
        return self._running.cancel()


@pytest.fixture
def feed(monkeypatch: pytest.MonkeyPatch) -> Iterator[StatusFeed]:
    monkeypatch.setattr(feeds, "Subscription", _Subscription)
    monkeypatch.setattr(_Subscription, "finished", [], raising=False)
    with StatusFeed({}, "billing") as opened:
        yield opened


def test_what_arrives_while_ctrl_c_ends_the_wait_is_neither_lost_nor_committed_unseen(
    feed: StatusFeed, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: Callable[..., Future[Any]] = asyncio.run_coroutine_threadsafe
    with monkeypatch.context() as interrupted:
        interrupted.setattr(asyncio, "run_coroutine_threadsafe", lambda *work: _Interrupted(run(*work)))
        with pytest.raises(KeyboardInterrupt):
            feed.take()
    feed.commit()
    assert _Subscription.finished == []
    status = feed.take(10)
    assert status is not None and status.record.offset == 7
    feed.commit()
    assert _Subscription.finished == [status.record]
    assert feed.take(0.01) is None
