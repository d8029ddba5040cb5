-- Where envelopes are, and what was forgotten: envelopes in columns that are not protected, what other tools encrypted, and
-- columns, and keys of JSON, that sound like secrets and hold none.

-- The text form of an envelope begins with rk1:UksB and has 104 characters or more; its bytes, 75 or more, are printed as
-- \x524b01..., in an array, a row or JSON too. Nothing is cast to text, which may be anybody's function: format() calls the
-- output function of a type.
-- A name proves nothing: whoever may make a schema may call it cron.
create or replace function rekey._is_extension_table(relation oid) returns boolean
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  select exists (
    select from pg_depend d join pg_extension x on x.oid = d.refobjid
    where d.classid = 'pg_class'::regclass and d.objid = relation and d.deptype = 'e' and d.refclassid = 'pg_extension'::regclass
      and x.extname in ('pg_cron', 'supabase_vault'));
end;
comment on function rekey._is_extension_table is 'Whether a table belongs to pg_cron or Supabase Vault, which hold no envelopes.';
grant execute on function rekey._is_extension_table to rekey_operator, rekey_auditor;

create or replace function rekey._sounds_secret(name text) returns boolean
language sql immutable parallel safe
begin atomic
  select w.words ~ (' [a-z]*(token|secret|password|passwd|passwort|kennwort|passphrase|passcode|(api|private|secret|access|signing|encryption)key|credential)s? '
      || '| (pwd|pat|bearer|creds?|jwt|[th]?otp|cvv|cvc|senha|mnemonic) '
      || '| (api|private|secret|access|signing|encryption|encrypted|decryption|master|hmac|aes|rsa|ssh|pgp|gpg|ssl|tls|vapid|deploy|shared|session|auth|account|server|service|role|webhook) keys? '
      || '| (seed|recovery|backup) (phrase|word|code)s? '
      || '| (smtp|imap|pop|mail|email|db|database|postgres|pg|mysql|redis|mongo|amqp|mqtt|user|admin|root|ftp|sftp|ssh|ldap|bind|proxy|wifi|vpn|http|auth|login) ?pass '
      || '|^ pass $')
    -- What is said of a secret is none.
    and w.words !~ (' (id|ids|uuid|name|label|title|type|kind|status|state|version|format|scope|scopes|prefix|suffix|hint|count|counts|length|len|size|limit|usage|used|remaining|quota|budget'
      || '|cost|price|at|on|by|date|time|timestamp|ttl|age|lifetime|expiry|expires|expired|expiration|created|updated|changed|rotated|revoked|issued|reset|enabled|disabled|required|valid|verified'
      || '|policy|strategy|strength|score|algorithm|alg|issuer|audience|provider|source|owner|manager|url|uri|endpoint|path|file|filename|location|arn|ref|reference'
      || '|hash|hashes|digest|checksum|fingerprint|salt|symbol|address|balance|supply|decimals|description|comment|note|notes|question|attempts|flag|index|position) $')
    and w.words !~ '^ (is|has|have|needs?|requires?|uses?|allows?|shows?|max|min|num|number|non?|total|prompt|completion|input|output|cached|design|public) '
    and w.words !~ ' (next|prev|previous|page|paging|sync|cursor|continuation) tokens? | public keys? $'
  from (
    -- The words of camelCase, PascalCase and snake_case, with blanks, hyphens or digits in between.
    select ' ' || btrim(lower(regexp_replace(regexp_replace(regexp_replace(
      name collate "C", '([a-z])([A-Z])', '\1 \2', 'g'), '([A-Z])([A-Z][a-z])', '\1 \2', 'g'), '[^A-Za-z]+', ' ', 'g'))) || ' ' as words) w;
end;
comment on function rekey._sounds_secret is
  'Whether a name, of a column or a key of JSON, sounds like a secret: token, password, apiKey, smtpPass and their kin. token_count, passwordResetAt and the like do not.';
grant execute on function rekey._sounds_secret to rekey_admin, rekey_operator, rekey_auditor;

create or replace function rekey._has_secret(document json) returns boolean
language sql immutable parallel safe
begin atomic
  with recursive parts (name, value) as (
    select null::text, document
    union all
    select e.name, e.value
    from parts p
    cross join lateral (
      select o.key, o.value from json_each(case when json_typeof(p.value) = 'object' then p.value end) o
      union all
      select p.name, a.value from json_array_elements(case when json_typeof(p.value) = 'array' then p.value end) a
    ) as e(name, value)
  )
  select exists (
    select from parts p
    where json_typeof(p.value) = 'string' and p.value::text <> '""' and left(p.value::text, 5) <> '"rk1:' and rekey._sounds_secret(p.name));
end;
comment on function rekey._has_secret is 'Whether a JSON document has, at any depth, a string that is no envelope under a key that sounds like a secret, or in an array under one.';
grant execute on function rekey._has_secret to rekey_admin, rekey_operator, rekey_auditor;

create or replace function rekey.find_envelopes()
returns table (relation regclass, column_name name, envelopes bigint, embedded bigint, others bigint, encrypted bigint, secret_keys bigint)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set row_security = off  -- an error, where a policy would hide rows
set bytea_output = hex
set constraint_exclusion = off  -- as rekey.search_step()
as $$
declare
  -- Conditions on a value.
  v_of_bytes text := $q$substr(%1$s, 1, 3) = '\x524b01' and octet_length(%1$s) >= 75 and octet_length(%1$s) %% 16 = 11$q$;
  v_of_text text := $q$left(%1$s, 20) collate "C" ~ '^rk1:UksB[A-Za-z0-9+/]{12}'$q$;
  -- In full: source text of pg_rekey, this line too, may stand in a table of migrations.
  v_within text := $q$(strpos(%1$s collate "C", 'rk1:UksB') > 0 and %1$s collate "C" ~ 'rk1:UksB[A-Za-z0-9+/]{96}'
    or strpos(%1$s collate "C", '\x524b01') > 0 and %1$s collate "C" ~ '\\x524b01[0-9a-f]{144}')$q$;
  v_of_others text := $q$octet_length(%1$s) >= 16 and coalesce(rekey._mark_within(%1$s), 'envelope') <> 'envelope'$q$;
  -- (To take a document apart takes long: not without one of these letters in a key.)
  v_of_keys text := $q$%1$s ~* '(token|secret|pass|pwd|wort|key|cred|pat|bearer|jwt|otp|cv[cv]|senha|mnemonic|phrase|word|code)[^"]*"\s*:' and rekey._has_secret(%1$s::json)$q$;
  v_table record;
  v_part oid;
  v_counts bigint[];
begin
  for v_table in
    select c.oid, c.oid::regclass as relation, array_agg(a.attname order by a.attnum) as names,
      string_agg(case k.kind
        when 'bytea' then format($q$count(*) filter (where %2$s), 0, count(*) filter (where substr(%1$s, 1, 3) <> '\x524b01'), count(*) filter (where %3$s), null$q$,
          v.value, format(v_of_bytes, v.value), format(v_of_others, v.value))
        when 'text' then format($q$count(*) filter (where %2$s), count(*) filter (where not (%2$s) and %3$s),
            count(*) filter (where left(%1$s, 4) collate "C" <> 'rk1:'), count(*) filter (where %4$s), null$q$,
          v.value, format(v_of_text, v.value), format(v_within, v.value), format(v_of_others, format($q$convert_to(%s, 'UTF8')$q$, v.value)))
        -- Of what else holds text, what is empty is nothing.
        else format($q$0, count(*) filter (where %2$s), %3$s, count(*) filter (where %4$s), %5$s$q$, v.value, format(v_within, v.printed),
          case when k.kind <> 'other' then format($q$count(*) filter (where %s not in ('', 'null', '""', '{}', '[]'))$q$, v.printed) else 'null' end,
          format(v_of_others, format($q$convert_to(%s, 'UTF8')$q$, v.printed)),
          case when k.kind = 'json' then format('count(*) filter (where %s)', format(v_of_keys, v.printed)) else 'null' end) end,
        ', ' order by a.attnum) as counts
    from pg_class c
    join pg_namespace n on n.oid = c.relnamespace
    join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
    cross join lateral (select format('t.%I', a.attname), format($q$format('%%s', t.%I)$q$, a.attname)) as v(value, printed)
    join pg_type y on y.oid = a.atttypid
    left join pg_type e on e.oid = y.typelem and y.typcategory = 'A'
    cross join lateral (
      select case
        when y.oid = 'bytea'::regtype then 'bytea'
        when y.oid in ('text'::regtype, 'varchar'::regtype) then 'text'
        when y.oid in ('json'::regtype, 'jsonb'::regtype) or y.typbasetype in ('json'::regtype, 'jsonb'::regtype) then 'json'
        when y.typcategory = 'S' or e.typcategory = 'S' or 'bytea'::regtype in (y.typbasetype, e.oid) then 'strings'
        else 'other' end) as k(kind)
    where c.relkind in ('r', 'p', 'm') and not c.relispartition and c.relpersistence <> 't' and c.relispopulated
      and c.oid >= 16384 and not (n.nspname in ('rekey', 'rekey_targets') and c.relowner = 'rekey_owner'::regrole) and rekey._is_extension_table(c.oid) is false
      -- Numbers, times, network addresses and the like have no room for one.
      and coalesce(e.typlen, y.typlen) not between 1 and 74 and coalesce(e.typcategory, y.typcategory) not in ('N', 'B', 'D', 'T', 'E', 'G', 'I', 'V')
    group by c.oid
    order by c.oid::regclass::text
  loop
    relation := v_table.relation;
    v_counts := null;
    begin
      for v_part in
        with recursive parts as (
          select v_table.oid as oid
          union select i.inhrelid from pg_inherits i join parts p on p.oid = i.inhparent
        )
        select p.oid from parts p
      loop
        if rekey._hold(v_part, v_part::regclass::text) is not null then
          raise exception using errcode = 'RKEND';
        end if;
      end loop;
      execute format('select array[%s] from %s t', v_table.counts, relation) into v_counts;
      raise exception using errcode = 'RKEND';
    exception
      when sqlstate 'RKEND' then null;  -- gives the locks back
      when others then null;  -- nothing is known of it
    end;
    for v_place in 1 .. case when v_counts is null then 1 else cardinality(v_table.names) end loop
      column_name := case when v_counts is not null then v_table.names[v_place] end;
      envelopes := v_counts[5 * v_place - 4];
      embedded := v_counts[5 * v_place - 3];
      others := v_counts[5 * v_place - 2];
      encrypted := v_counts[5 * v_place - 1];
      secret_keys := v_counts[5 * v_place];
      return next;
    end loop;
  end loop;
end
$$;
comment on function rekey.find_envelopes is
  'Counts, in every column that has room for one: envelopes; values of another kind that an envelope stands in (text around it, JSON, arrays, rows, domains, and their like); of columns of text, bytea or JSON, their domains and arrays, others; of those, what looks encrypted by another tool; and JSON documents that have a string under a key that sounds like a secret. Reads every ordinary and partitioned table and materialized view that the caller may read, whole, with his rights; of one that he may not read whole, or that has an index or statistics over a function that is neither a superuser''s nor his, which reading it may run, there is a row without a column. Left out are tables of PostgreSQL, pg_rekey, pg_cron and Supabase Vault, temporary and foreign tables, large objects, and what stands within a longer bytea value.';
grant execute on function rekey.find_envelopes to rekey_admin, rekey_operator, rekey_auditor;

create or replace function rekey.find_unprotected()
returns table (relation regclass, column_name name, finding text, rows bigint, advice text, action text)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return query
    select f.relation, f.column_name, w.finding, w.rows, w.advice, w.action
    from rekey.find_envelopes() with ordinality f (relation, column_name, envelopes, embedded, others, encrypted, secret_keys, place)
    left join rekey.column_status s on s.relation = f.relation and s.column_name = f.column_name
    cross join lateral (
      select format('%L, %L', f.relation, f.column_name) as names,
        -- Those of Supabase's own schemas are its own affair.
        (select s.nspowner::regrole::text !~ '^"?supabase' from pg_class c join pg_namespace s on s.oid = c.relnamespace where c.oid = f.relation) as ours,
        exists (select from pg_attribute a where a.attrelid = f.relation and a.attname = f.column_name
                and a.atttypid in ('text'::regtype, 'varchar'::regtype, 'bytea'::regtype)) as fit) n
    cross join lateral (values
      (f.column_name is null, 'cannot be read', null, 'Look at it as its owner.', null),
      (f.envelopes > 0 and s.label is null, 'holds envelopes, and is not protected', f.envelopes,
        format('select rekey.protect_column(%s): without it no rotation takes these rows along.', n.names), 'protect_found'),
      (f.embedded > 0, 'holds envelopes within other values', f.embedded,
        'No rotation takes them along, and a key that only they stand on counts as unused. Give them a column of their own, and protect it.', null),
      (f.others > 0 and s.label is not null, 'is protected, and holds values that are not encrypted', f.others,
        format('select rekey.adopt_column(%s)', n.names), 'adopt_plaintext'),
      (f.encrypted > 0 and s.label is null and n.ours, 'holds values that another tool encrypted', f.encrypted,
        case when n.fit then format('select rekey.protect_column(%s), then pg-rekey columns adopt --from what that tool writes', n.names)
          else 'Give them a column of type text or bytea, and protect it.' end,
        case when n.fit then 'adopt_encrypted' end),
      (f.others > coalesce(f.encrypted, 0) and s.label is null and n.ours and rekey._sounds_secret(f.column_name::text), 'sounds like a secret, and is not encrypted',
        f.others - coalesce(f.encrypted, 0),
        case when n.fit then format('select rekey.protect_column(%s), then rekey.adopt_column()', n.names)
          else 'Give the values a column of type text or bytea, and protect it.' end,
        case when n.fit then 'protect_and_adopt' end),
      (f.secret_keys > 0 and n.ours and not rekey._sounds_secret(f.column_name::text), 'has JSON keys that sound like secrets, and are not encrypted', f.secret_keys,
        'Give their values a column of type text or bytea, and protect it.', null)
    ) as w (so, finding, rows, advice, action)
    -- A materialized view is a copy, made anew by REFRESH.
    where w.so and (select c.relkind from pg_class c where c.oid = f.relation) <> 'm'
    order by f.place;
end
$$;
comment on function rekey.find_unprotected is
  'Columns that were forgotten: those that hold envelopes and are not protected, or hold them within other values; those that hold what another tool encrypted; and those whose name, or a key of whose JSON, sounds like a secret, or that are protected, and hold something else. Values are counted, never shown. A table that the caller may not read whole is a finding. action: what is advised, for whoever says it in other words than those of SQL; NULL: the words are the same everywhere. Reads what rekey.find_envelopes() reads, with the rights of the caller.';
grant execute on function rekey.find_unprotected to rekey_admin, rekey_operator, rekey_auditor;
