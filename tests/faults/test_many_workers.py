"""Every way to work on rotations at once: each row is re-encrypted once, and each step is taken once."""

import threading
from collections.abc import Callable
from functools import partial

from cli_fixtures import Cli, eventually, process
from driving import check, events, fill, in_background, rotate, rotation
from helpers import Connection

pytest_plugins = ["cli_fixtures"]


def test_two_rotations_among_workers_ticks_and_calls_by_hand(
    cli_ready: Cli, ready: Connection, session: Callable[[], Connection]
) -> None:
    ready.execute("select rekey.create_keyring('other'); select rekey.set_setting('batch_target', '10 ms')")
    model = fill(ready, 3000) | fill(ready, 3000, keyring="other", prefix="o")

    def call(statement: bytes) -> Callable[[threading.Event], None]:
        connection = session()

        def task(stop: threading.Event) -> None:
            while not stop.wait(0.01):
                connection.execute(statement)

        return task

    tick, manual = b"call rekey.tick()", b"call rekey.run_rotations('5 s')"

    def rotated(number: int) -> bool:
        return bool(rotation(ready, number, "state") == "completed")

    with (
        process("work", "--forever"),
        process("work", "--forever"),
        in_background(call(tick), call(tick), call(manual)),
    ):
        for _ in range(3):
            for number in (rotate(ready), rotate(ready, "other")):
                eventually(partial(rotated, number))
                assert rotation(ready, number, "rows_done", "rows_failed", "attempts") == (3000, 0, 0)
                log = events(ready, number)
                assert log.count("rotation.started") == log.count("rotation.completed") == 1
                assert "rotation.error" not in log
    check(ready, model)
