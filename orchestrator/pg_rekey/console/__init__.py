"""The console of `pg-rekey serve`: pages that the server renders, for a browser."""
