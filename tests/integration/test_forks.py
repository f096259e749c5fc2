"""A client whose process forks, as gunicorn's preload and Celery's prefork do, against a real broker."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.integration.records import PATIENCE_SECONDS, prepare_topics
from tests.servers.kafka import Kafka

# The parent makes everything, forks, and waits for the child; the child prints what each call came to. At the end of
# either the interpreter destroys what is left.
_PROGRAM = """
import asyncio, ctypes, json, os, sys
from queryd import AsyncQueryClient, EventFeed, QueryClient

config, ORG = json.loads(sys.argv[1]), "6a1f7f4e-3f0e-4f5c-9d55-0d6f1f2f9a10"

async def open_async():
    client = AsyncQueryClient(config)
    await client.open()
    return client, client.handle(ORG, org_id=ORG)

loop = asyncio.new_event_loop()
twin, twin_handle = loop.run_until_complete(open_async())
client = QueryClient(config)
handle = client.handle(ORG, org_id=ORG)
feed = EventFeed(config, "billing")
feed.take(0.1)

def told(call):
    try:
        return f"returned {call()}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"

def awaited(work):
    return lambda: asyncio.new_event_loop().run_until_complete(work())

child = os.fork()
if child == 0:
    # Both processes have one epoll: a loop that the child's interpreter destroys would never wake in the parent.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(loop))
    answers = {
        "submit": told(lambda: client.submit("SELECT 1", org_id=ORG)),
        "cancel": told(lambda: client.cancel(ORG, org_id=ORG)),
        "handle": told(lambda: client.handle(ORG)),
        "events": told(lambda: client.events(group="billing")),
        "close": told(client.close),
        "wait": told(handle.wait),
        "latest": told(handle.latest),
        "result": told(handle.result),
        "cancel of a handle": told(handle.cancel),
        "take": told(feed.take),
        "commit": told(feed.commit),
        "close of a feed": told(feed.close),
        "async submit": told(awaited(lambda: twin.submit("SELECT 1", org_id=ORG))),
        "async wait": told(awaited(twin_handle.wait)),
        "async latest": told(awaited(twin_handle.latest)),
        "async close": told(awaited(twin.close)),
    }
    del client, feed, twin, handle, twin_handle
    with QueryClient(config) as own:
        answers["own"] = str(own.submit("SELECT 1", org_id=ORG).status)
    print(json.dumps(answers), flush=True)
    sys.exit(7)
_, status = os.waitpid(child, 0)
# The parent goes on as if nothing had been.
client.submit("SELECT 1", org_id=ORG)
feed.take(0.1)
feed.close()
client.close()
loop.run_until_complete(twin.close())
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.fixture(scope="module")
def config(kafka: Kafka) -> dict[str, Any]:
    return prepare_topics(kafka)


def test_a_client_in_a_fork_raises_client_stopped(config: dict[str, Any]) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", _PROGRAM, json.dumps(config)],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_SECONDS,
        check=False,
    )
    # The child ended by itself, with its own code.
    assert done.returncode == 7, done.stderr
    answers = json.loads(done.stdout)
    assert answers.pop("own") == "None"
    for call, answer in answers.items():
        assert "created the client and process" in answer and answer.startswith("ClientStopped: "), (call, answer)
        assert "create the client after the fork" in answer
