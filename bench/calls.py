"""What a single call costs, in the server: no network, no planning, no commit."""

import random
from typing import Any, LiteralString

from bench.estate import Estate, fill_secrets, settle, value
from pg_rekey import db

SIZE = 256
SECRETS = 1000

# Each is called in a loop of PL/pgSQL, with variables that hold the name, the id, or the value in question.
CALLS: dict[str, tuple[str, LiteralString, int]] = {
    "get_secret": ("`get_secret(name)`", "v_text := rekey.get_secret(v_name)", 1),
    "view": (
        "`decrypted_secrets`, by name",
        "select s.value into v_text from rekey.decrypted_secrets s where s.name = v_name",
        1,
    ),
    "set_secret": ("`set_secret(name, value)`, an update", "v_id := rekey.set_secret(v_name, v_value)", 1),
    "read_secrets": (
        "`read_secrets` of 1,000, each",
        "select count(*) into v_count from rekey.read_secrets(v_names)",
        SECRETS,
    ),
    "encrypt": ("`encrypt(value)`", "v_bytes := rekey.encrypt(v_value)", 1),
    "decrypt": ("`decrypt(ciphertext)`", "v_bytes := rekey.decrypt(v_sealed)", 1),
    "vault_view": (
        "Vault stand-in: `decrypted_secrets`, by name",
        "select s.decrypted_secret into v_text from bench.decrypted_secrets s where s.name = v_name",
        1,
    ),
    "vault_update": (
        "Vault stand-in: `update_secret(id, value)`",
        "perform bench.update_secret(v_ids[v_place], v_value)",
        1,
    ),
    "pgp_fast_encrypt": (
        "`pgp_sym_encrypt`, `s2k-mode=0`, AES-256",
        "v_bytes := pgp_sym_encrypt(v_value, 'passphrase', 's2k-mode=0, cipher-algo=aes256')",
        1,
    ),
    "pgp_fast_decrypt": (
        "`pgp_sym_decrypt` of that",
        "v_text := pgp_sym_decrypt(v_pgp_fast[1 + n % 50], 'passphrase')",
        1,
    ),
    "pgp_encrypt": ("`pgp_sym_encrypt`, defaults", "v_bytes := pgp_sym_encrypt(v_value, 'passphrase')", 1),
    "pgp_decrypt": (
        "`pgp_sym_decrypt` of that",
        "v_text := pgp_sym_decrypt(v_pgp[1 + n % 50], 'passphrase')",
        1,
    ),
    "empty": ("the loop itself", "v_text := v_name", 1),
}

LOOP = """
create function pg_temp.loop_{name}(loops integer) returns double precision
language plpgsql
as $$
declare
  v_begin timestamptz;
  v_place integer;
  v_name text;
  v_id uuid;
  v_text text;
  v_bytes bytea;
  v_count bigint;
  v_value text := bench.value(1, {size});
  v_names text[] := array(select 'secret-' || n from generate_series(1, {secrets}) n);
  v_ids uuid[] := array(select id from bench.vault order by id);
  v_sealed bytea := rekey.encrypt(v_value);
  -- PGP draws the work factor of each by lot.
  v_pgp bytea[] := array(select pgp_sym_encrypt(v_value, 'passphrase') from generate_series(1, 50));
  v_pgp_fast bytea[] := array(
    select pgp_sym_encrypt(v_value, 'passphrase', 's2k-mode=0, cipher-algo=aes256')
    from generate_series(1, 50));
begin
  v_begin := clock_timestamp();
  for n in 1..loops loop
    v_place := 1 + n % {secrets};
    v_name := v_names[v_place];
    {call};
  end loop;
  return extract(epoch from clock_timestamp() - v_begin);
end
$$"""


def calls(estate: Estate, loops: int, rounds: int) -> dict[str, Any]:
    """Return the seconds that each call took, by round, without those of the loop around it."""
    with estate.database("calls") as connection:
        fill_secrets(connection, SECRETS, SIZE)
        connection.execute("select bench.fill_vault(%s, %s)", [SECRETS, SIZE])
        for name, (_, call, _) in CALLS.items():
            connection.execute(LOOP.format(name=name, call=call, size=SIZE, secrets=SECRETS).encode())
            _loop(connection, name, 10)
        seconds: dict[str, list[float]] = {name: [] for name in CALLS}
        for number in range(rounds):
            for name in random.Random(number).sample(list(CALLS), len(CALLS)):
                settle(connection, "rekey.secrets", "bench.vault")
                each = CALLS[name][2]
                count = max(1, loops // each)
                seconds[name].append(_loop(connection, name, count) / count / each)
        empty = seconds.pop("empty")
        return {
            "size": SIZE,
            "envelope_bytes": value(
                connection, "select octet_length(rekey.encrypt(bench.value(1, %s)))", SIZE
            ),
            "calls": [
                {
                    "name": name,
                    "label": CALLS[name][0],
                    "seconds": [
                        took - loop / CALLS[name][2] for took, loop in zip(samples, empty, strict=True)
                    ],
                }
                for name, samples in seconds.items()
            ],
        }


def _loop(connection: db.Connection, name: str, loops: int) -> float:
    return float(value(connection, f"select pg_temp.loop_{name}(%s)", loops))
