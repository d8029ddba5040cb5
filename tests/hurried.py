"""pg-rekey whose worker looks for what is due twice a second, in place of every ten seconds."""

from pg_rekey import worker
from pg_rekey.cli import main

worker.TICK_SECONDS = 0.5

if __name__ == "__main__":
    main()
