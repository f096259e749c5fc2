"""What the documents print, to be run exactly as it stands there."""

import re
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


def read_blocks(document: str, language: str, section: str) -> list[str]:
    """The code blocks of a language in a section, which is named by its heading; there must be one at least."""
    text = (_ROOT / document).read_text(encoding="utf-8")
    parts = re.split(r"^## ", text, flags=re.MULTILINE)
    [wanted] = [part for part in parts if part.startswith(f"{section}\n")]
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", wanted, flags=re.MULTILINE | re.DOTALL)
    assert blocks, f"no {language} in the section {section} of {document}"
    return blocks
