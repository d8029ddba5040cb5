#!/usr/bin/env bash
# What click.echo() writes during a rich progress bar lands in the middle of it; what print() writes does not.
#
# With     click 8.5.1, rich 15.0.0 (PyPI); pyte 0.8.2 shows what a terminal would
# Input    click.echo("said", err=True) within rich.progress.Progress(console=Console(stderr=True)), whose
#          redirect_stderr is on by default
# Guess    Both write to sys.stderr, which rich has replaced: the line stands above the bar.
# Seen     print(file=sys.stderr) is put above the bar. click.echo() takes the binary buffer that lies beneath sys.stderr,
#          which rich's stand-in passes on, and writes to the terminal itself: its text goes on where the bar ends.
# For us   The command line prints with print() while a bar is shown.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check click==8.5.1 rich==15.0.0 pyte==0.8.2 2>/dev/null

cat >"$folder/bar.py" <<'PY'
import sys

import click
from rich.console import Console
from rich.progress import Progress

with Progress(console=Console(stderr=True, force_terminal=True, width=60), auto_refresh=False) as bar:
    task = bar.add_task("bar", total=2)
    bar.advance(task)
    bar.refresh()
    if sys.argv[1] == "echo":
        click.echo("said", err=True)
    else:
        print("said", file=sys.stderr)
    bar.advance(task)
    bar.refresh()
PY
for how in print echo; do
	"$folder/venv/bin/python" "$folder/bar.py" $how 2>"$folder/$how"
done
seen=$("$folder/venv/bin/python" - "$folder" <<'PY'
import sys
from pathlib import Path

import pyte

for how in ("print", "echo"):
    screen = pyte.Screen(60, 10)
    pyte.Stream(screen).feed(Path(sys.argv[1], how).read_text().replace("\n", "\r\n"))
    print(how, any(line.strip() == "said" for line in screen.display))
PY
)
echo "a line of its own: $seen"
[ "$seen" = $'print True\necho False' ] || { echo 'this is not what was seen before' >&2; exit 1; }
