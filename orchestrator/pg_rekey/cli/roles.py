"""Which role a command takes, for the hint that follows a refusal."""

from pg_rekey import db

# By the first words of a command. Roles of the database, and of tables, are the database's to name.
NEEDS = {
    "audit": "rekey_auditor",
    "columns": "rekey_admin",
    "columns list": "rekey_operator",
    "doctor": "rekey_operator",
    "kek": "rekey_admin",
    "kek check": "rekey_operator",
    "kek list": "rekey_operator",
    "keyrings": "rekey_admin",
    "keyrings list": "rekey_operator",
    "keys": "rekey_admin",
    "keys list": "rekey_operator",
    "keys search": "rekey_operator",
    "keys usage": "rekey_operator",
    "metrics": "rekey_operator",
    "notify": "rekey_admin",
    "notify list": "rekey_operator",
    "notify messages": "rekey_operator",
    "rotate": "rekey_admin",
    "rotations": "rekey_admin",
    "rotations failures": "rekey_operator",
    "rotations list": "rekey_operator",
    "rotations show": "rekey_operator",
    "rotations watch": "rekey_operator",
    "schedule": "rekey_admin",
    "schedule show": "rekey_operator",
    "secrets": "rekey_app",
    "settings": "rekey_admin",
    "settings show": "rekey_operator",
    "status": "rekey_operator",
    "verify": "rekey_operator",
    "work": "rekey_operator",
}


def needed(command: str) -> str | None:
    """Return the role that a command takes, or None where it is not one of ours alone."""
    return NEEDS.get(command) or NEEDS.get(command.split(" ")[0])


def advice(connection: db.Connection, command: str) -> str | None:
    """Say which role is missing, and who gives it; None where that is not what is wrong."""
    role = needed(command)
    if role is None:
        return None
    [row] = connection.execute(db.query("membership"), [role]).fetchall()
    if row["member"]:
        return None
    return (
        f"`pg-rekey {command}` takes the role {role}, and {row['login']} is no member of it. "
        f"An administrator gives it: GRANT {role} TO {row['quoted']};"
    )
