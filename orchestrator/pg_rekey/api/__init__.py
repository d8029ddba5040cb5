"""The HTTP API: what administrators may do without a shell on the database. `pg-rekey serve` runs it."""
