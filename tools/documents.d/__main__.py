"""tools/documents: writes each document from the code that it describes."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import bash
import fish
import manual
import readme
import schema
import zsh
from programs import PROGRAMS

ROOT = Path(__file__).parents[2]


def main() -> int:
    """Write what is stale, or only name it; returns the exit status."""
    arguments = argparse.ArgumentParser(prog="tools/documents", description=__doc__)
    arguments.add_argument("--check", action="store_true", help="write nothing; 1 if any is stale")
    check = arguments.parse_args().check
    stale = 0
    for name, text in documents().items():
        path = ROOT / name
        if path.is_file() and path.read_text() == text:
            continue
        stale += 1
        if check:
            print(f"{name} is stale; run tools/documents")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            print(f"{name}: written")
    return 1 if check and stale else 0


def documents() -> dict[str, str]:
    """Return the text of each document by its path in the checkout."""
    made = {f"deploy/man/{page}": manual.page(page) for page in manual.PAGES}
    for program in PROGRAMS:
        made[f"deploy/completions/bash/{program.name}"] = bash.completion(program)
        made[f"deploy/completions/zsh/_{program.name}"] = zsh.completion(program)
        made[f"deploy/completions/fish/{program.name}.fish"] = fish.completion(program)
    made["deploy/disks.schema.json"] = json.dumps(schema.schema(), indent=2) + "\n"
    made["README.md"] = readme.with_tables((ROOT / "README.md").read_text())
    return made


sys.exit(main())
