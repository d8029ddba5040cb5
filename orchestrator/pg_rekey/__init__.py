"""pg_rekey: online rotation of encryption keys in PostgreSQL."""

from pg_rekey.db import unlock

__all__ = ["unlock"]
