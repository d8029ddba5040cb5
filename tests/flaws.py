"""Products that are broken on purpose, for the random walk to find it: `make prove ARGS=--flaws`."""

import time
from collections import Counter
from dataclasses import dataclass

from pg_rekey import release
from stateful import Lab, walk


@dataclass(frozen=True)
class Flaw:
    """A mend that is taken out again: in a file of sql/code, what stands there becomes something else."""

    name: str
    file: str
    old: str
    new: str
    after: str = ""  # and what was made before, taken back

    def sql(self) -> str:
        """The file with the flaw in it."""
        text = (release.SOURCES / "code" / self.file).read_text()
        assert text.count(self.old) == 1, f"{self.name}: {self.file} has changed"
        text = text.replace(self.old, self.new)
        return f"set search_path = pg_catalog, public, pg_temp; {text}; {self.after}"


# As functions are where nothing is said of it: what a policy hides, they take for absent.
SEE_LESS = """
    do $$
    declare
      v_function regprocedure;
    begin
      for v_function in
        select p.oid from pg_proc p where p.prosecdef and pg_get_userbyid(p.proowner) = 'rekey_owner'
      loop
        execute format('alter function %s reset row_security', v_function);
      end loop;
    end $$"""

# The triggers of the columns that are protected already.
SLEEP = """
    do $$
    declare
      v_trigger record;
    begin
      for v_trigger in
        select t.tgrelid::regclass as relation, t.tgname from pg_trigger t where t.tgname ~ '^zz_pg_rekey_'
      loop
        execute format('alter table %s enable trigger %I', v_trigger.relation, v_trigger.tgname);
      end loop;
    end $$"""

FLAWS = [
    Flaw(
        "an IV is used twice",
        "41_encrypt.sql",
        "v_iv := rekey._random_bytes(16)",
        "v_iv := repeat('x', 16)::bytea",
    ),
    Flaw(
        "a writer's version falls out of use before he commits",
        "41_encrypt.sql",
        "perform pg_advisory_xact_lock_shared(keyring_id, v_version);",
        "null;",
    ),
    Flaw(
        "a key that the session carries opens whatever its state is",
        "32_keys.sql",
        "k.kek_id, e.state, false) is null;\n  if found and",
        "k.kek_id, e.state, false) is null or true;\n  if found and",
    ),
    Flaw(
        "a table that took another's name is not noticed",
        "51_columns.sql",
        "v_other := rekey._namesake(protected, v_shape.relation, v_shape.attnums[protected.places[1]]);",
        "v_other := null;",
    ),
    Flaw(
        "a table that was dropped and made anew is not noticed",
        "51_columns.sql",
        "return format('its table or column was dropped, or its functions were not restored:",
        "return null; return format('its table or column was dropped, or its functions were not restored:",
    ),
    Flaw(
        "a partition that left is not noticed",
        "51_columns.sql",
        "v_other := rekey._lost_part(protected, v_leaves);",
        "v_other := null;",
    ),
    Flaw(
        "a file of one page is taken for an empty one",
        "50_targets.sql",
        "operator(pg_catalog.>) 0 then",
        "operator(pg_catalog.>) 8192 then",
    ),
    Flaw(
        "of small tables, what does not open is counted as what does",
        "61_verify.sql",
        "left join failing f on f.n = u.n",
        "left join failing f on false",
    ),
    Flaw(
        "forced policies are not noticed",
        "51_columns.sql",
        "where w.relforcerowsecurity or w.relowner",
        "where w.relowner",
    ),
    Flaw(
        "forced policies on our own tables are not noticed",
        "13_own_tables.sql",
        "when c.relforcerowsecurity then",
        "when false then",
        SEE_LESS,
    ),
    Flaw(
        "names of pg_cron are believed",
        "70_schedule.sql",
        "if rekey._trusted_relation('pg_cron', 'cron', 'job_run_details', 8) is not null then",
        "if to_regclass('cron.job_run_details') is not null then",
    ),
    Flaw(
        "what the search finds is not heeded",
        "62_destruction.sql",
        "v_postponed text := elsewhere;",
        "v_postponed text;",
    ),
    Flaw(
        "old snapshots are not waited for",
        "62_search.sql",
        "where a.datname = current_database() and a.pid <> pg_backend_pid()",
        "where false",
    ),
    Flaw(
        "a version is scheduled, and the triggers do not look",
        "32_keys.sql",
        "perform rekey._expect_doomed();",
        "null;",
    ),
    Flaw(
        "the triggers stop to look while a version is scheduled",
        "32_keys.sql",
        "if not exists (select from rekey.encryption_keys k where k.state = 'destroy_scheduled') then",
        "if true then",
    ),
    Flaw(
        "triggers sleep in the replica role",
        "52_protect.sql",
        "v_statements := v_statements || format('alter table %s enable always trigger %I', target, v_name);",
        "null;",
        SLEEP,
    ),
    Flaw(
        "rows that somebody else has are waited for",
        "51_columns.sql",
        "' of t skip locked\n    )",
        "' of t\n    )",
    ),
    Flaw(
        "a search asks for the active version alone",
        "57_blind_index.sql",
        "v_versions := v_column.versions;",
        "v_versions := v_column.versions[cardinality(v_column.versions):];",
    ),
    Flaw(
        "what is searched for is swept without its index",
        "50_targets.sql",
        "rekey._normalized(p.plaintext, _reencrypt.normalization))",
        "rekey._normalized(p.old_iv, _reencrypt.normalization))",
    ),
    Flaw(
        "an adoption in line is never begun",
        "61_engine.sql",
        "perform rekey._next_in_line();",
        "null;",
    ),
    Flaw(
        "an adoption in line keeps the version that was active when it was asked for",
        "61_engine.sql",
        "to_version = (select k.version from rekey.encryption_keys k"
        " where k.keyring_id = r.keyring_id and k.state = 'active')",
        "to_version = r.to_version",
    ),
    Flaw(
        "an adoption begins beside what is under way",
        "63_adopt.sql",
        "exists (select from rekey.rotations r"
        " where r.keyring_id = v_keyring.id and rekey._is_under_way(r.state))",
        "false",
    ),
    Flaw(
        "an adoption ends with plain values left",
        "61_verify.sql",
        "else coalesce(a.rows, 0) - coalesce(a.refused, 0) end as behind",
        "else 0 end as behind",
    ),
    Flaw(
        "a sweep fires triggers all the same",
        "51_columns.sql",
        "'perform set_config(''session_replication_role'', ''replica'', true);'",
        "'perform set_config(''session_replication_role'', ''origin'', true);'",
    ),
    Flaw(
        "triggers stay off after a sweep",
        "51_columns.sql",
        "v_after text := case when protected.fire_triggers then '' else",
        "v_after text := case when true then '' else",
    ),
]


def find(flaw: Flaw, minutes: float) -> tuple[int | None, str]:
    """Walk until a flaw is found; return the seed that found it, and the first line of what was found.

    What the same seed finds without the flaw too is raised: it tells nothing of the flaw.
    """
    until = time.monotonic() + minutes * 60
    with Lab() as sound, Lab() as broken:
        broken.break_product(flaw.sql())
        number = 0
        while time.monotonic() < until:
            number += 1
            try:
                walk(broken, number, Counter())
            except Exception as error:  # noqa: BLE001: whatever the walk says is a find
                walk(sound, number, Counter())
                return number, f"{type(error).__name__}: {error}".strip().partition("\n")[0]
    return None, ""
