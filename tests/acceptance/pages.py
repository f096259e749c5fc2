"""The pages of the documentation as somebody follows them: every command block, from top to bottom, in one shell.

A block is fenced and has a language. `sh` and `python` are run; `text` is what a command prints. A block may be marked:

    <!-- not run: WHY -->                     it can't be run here
    <!-- run by tests/…/test_x.py: WHY -->    that test runs it, as printed

Two words stand for what the page's reader copies: `ID` is the id that the last `queryd submit`, `saved add` or `replay`
printed, and `HASH` the plan's hash that the last `queryd replay` printed.
"""

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUN = frozenset({"sh", "python"})
SHOWN = "text"

# A command of a page waits for queries, on a machine that may be busy.
_COMMAND_SECONDS = 120
_FENCE = re.compile(r"^```(\w*)\s*$")
_MARK = re.compile(r"^<!-- (not run|run by (?P<test>tests/[\w/]+\.py)): (?P<why>.+) -->$")
_HEREDOC = re.compile(r"<<-?\s*['\"]?(\w+)['\"]?")
_UUID = re.compile(r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b")
_HASH = re.compile(r"^plan: (\S+)$", re.MULTILINE)
_MAKES_AN_ID = re.compile(r"queryd (submit|saved add|replay .*--execute)")
_MAKES_A_HASH = re.compile(r"queryd replay ")
_SHELL = """\
set -a -o pipefail
if [ -s "$PAGE_STATE" ]; then . "$PAGE_STATE"; fi
eval "$1"
code=$?
export -p > "$PAGE_STATE"
exit $code
"""
_TAIL = 3_000


class PageBroken(AssertionError):
    """A block can't be run as it is printed; the sentence says which, and why."""


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block. `line` is its first line's number; `test` runs it where it is not run here."""

    page: str
    line: int
    language: str
    text: str
    why_not: str | None = None
    test: str | None = None

    @property
    def place(self) -> str:
        """`docs/x.md:12`, for a failure's sentence."""
        return f"{self.page}:{self.line}"


def read_page(page: str, text: str | None = None) -> list[Block]:
    """The blocks of a page in order. Raises `PageBroken` for one that says neither how to run it nor why not."""
    lines = ((ROOT / page).read_text(encoding="utf-8") if text is None else text).splitlines()
    blocks: list[Block] = []
    mark: re.Match[str] | None = None
    numbers = iter(range(len(lines)))
    for number in numbers:
        line = lines[number]
        if (fence := _FENCE.match(line)) is not None:
            end = next((n for n in range(number + 1, len(lines)) if lines[n] == "```"), None)
            if end is None:
                raise PageBroken(f"{page}:{number + 1}: the block does not end")
            blocks.append(_make_block(page, number + 2, fence[1], "\n".join(lines[number + 1 : end]), mark))
            for _ in range(number + 1, end + 1):
                next(numbers)
            mark = None
        elif (
            line.startswith("    ") and (number == 0 or not lines[number - 1].strip()) and not _in_a_list(lines, number)
        ):
            raise PageBroken(f"{page}:{number + 1}: fence the block (```sh, ```python, ```text), so that it can be run")
        elif line.strip():
            mark = _MARK.match(line)
            if mark is None and line.startswith(("<!-- not run", "<!-- run by")):
                raise PageBroken(f"{page}:{number + 1}: the mark is not `<!-- not run: WHY -->`: {line}")
    return blocks


def _in_a_list(lines: list[str], number: int) -> bool:
    """Whether the indented line goes on with an item above it."""
    above = next((line for line in reversed(lines[:number]) if line.strip() and not line.startswith("    ")), "")
    return re.match(r"\s*([-*]|\d+\.) ", above) is not None


def _make_block(page: str, line: int, language: str, text: str, mark: re.Match[str] | None) -> Block:
    if mark is None and language not in RUN | {SHOWN}:
        raise PageBroken(
            f"{page}:{line}: a block of {language or 'no language'}: say sh or python, text for output, or why it is "
            "not run (<!-- not run: WHY -->)"
        )
    if mark is None:
        return Block(page, line, language, text)
    test = mark["test"]
    if test is not None and (not (ROOT / test).exists() or page not in (ROOT / test).read_text(encoding="utf-8")):
        raise PageBroken(f"{page}:{line}: {test} does not run blocks of {page}")
    return Block(page, line, language, text, mark["why"], test)


@dataclass(slots=True)
class PageShell:
    """Runs blocks one after another, as typed into one terminal in `folder`. Variables stay from command to command."""

    folder: Path
    environment: dict[str, str]
    values: dict[str, str] = field(default_factory=dict)

    def run(self, block: Block) -> None:
        """Every command of the block. Raises `PageBroken` for the first that fails."""
        if block.language == "python":
            self._run_command(block, block.line, f"python - <<'END_OF_BLOCK'\n{block.text}\nEND_OF_BLOCK")
            return
        for line, command in split_commands(block.text):
            self._run_command(block, block.line + line, self._fill_in(block, command))

    def _fill_in(self, block: Block, command: str) -> str:
        for word in ("ID", "HASH"):
            if re.search(rf"\b{word}\b", command):
                if word not in self.values:
                    raise PageBroken(f"{block.place}: {word} stands for nothing that was printed above: {command}")
                command = re.sub(rf"\b{word}\b", self.values[word], command)
        return command

    def _run_command(self, block: Block, line: int, command: str) -> None:
        state = self.folder / ".page-state"
        try:
            done = subprocess.run(
                ["bash", "-c", _SHELL, "page", command],
                cwd=self.folder,
                env=self.environment | {"PAGE_STATE": str(state)},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_COMMAND_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise PageBroken(f"{block.page}:{line}: not done after {_COMMAND_SECONDS} s: {command}") from None
        if done.returncode != 0:
            raise PageBroken(
                f"{block.page}:{line}: exit code {done.returncode} of\n{command}\n"
                f"stdout:\n{done.stdout[-_TAIL:]}\nstderr:\n{done.stderr[-_TAIL:]}"
            )
        self._remember(command, done.stdout + done.stderr)

    def _remember(self, command: str, printed: str) -> None:
        if _MAKES_AN_ID.search(command):
            new = [each for each in _UUID.findall(printed) if each not in command]
            if new:
                self.values["ID"] = new[0]
        if _MAKES_A_HASH.search(command) and (hashes := _HASH.findall(printed)):
            self.values["HASH"] = hashes[-1]


def split_commands(text: str) -> Iterator[tuple[int, str]]:
    """The commands of a block, each with the number of its first line: as many lines as bash needs for a whole one."""
    taken: list[str] = []
    start = 0
    for number, line in enumerate(text.splitlines()):
        if not taken:
            start = number
        taken.append(line)
        command = "\n".join(taken)
        if not command.strip() or all(each.lstrip().startswith("#") for each in taken if each.strip()):
            taken = []
        elif _is_whole(command):
            yield start, command
            taken = []
    if taken:
        yield start, "\n".join(taken)


def _is_whole(command: str) -> bool:
    lines = command.splitlines()
    if lines[-1].endswith("\\"):
        return False
    if (opened := _HEREDOC.search(command)) is not None and opened[1] not in [line.strip() for line in lines[1:]]:
        return False
    return subprocess.run(["bash", "-n", "-c", command], capture_output=True, check=False).returncode == 0


def make_environment() -> dict[str, str]:
    """Of a terminal in which nothing of queryd's is set."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("QUERYD_", "AWS_", "PYTHON"))}
