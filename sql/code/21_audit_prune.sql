-- Old entries leave the audit log for a file, and leave an entry that tells which.

-- Before it removes anything: what is gone could not be looked at again.
create or replace function rekey._refuse_prune(first bigint, last bigint, hash text, checkpoint jsonb) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_start bigint := (rekey._audit_start()).last;
  v_keep interval := (rekey._settings()).audit_keep;
  v_until timestamptz;
  v_verified record;
begin
  if last <= v_start then
    raise exception 'entries up to % were removed already', v_start using errcode = 'RK006',
      hint = 'Export what follows them: pg-rekey audit export.', constraint = 'export';
  end if;
  if first <> v_start + 1 then
    raise exception 'the file begins at entry %, and the log at entry %', first, v_start + 1 using errcode = 'RK006',
      hint = 'Nothing is removed that is in no file. Export again: pg-rekey audit export.', constraint = 'export';
  end if;
  v_verified := rekey.verify_audit_log(checkpoint -> 'checkpoint');
  if not v_verified.valid then
    raise exception 'the audit log does not hold at entry %: %', v_verified.first_bad, v_verified.reason using errcode = 'RK006',
      hint = 'Nothing is removed from a log that is not whole: rekey.verify_audit_log() tells what is wrong.', constraint = 'verify';
  end if;
  if not exists (select from rekey.audit_log a where a.id = last and encode(a.hash, 'hex') = _refuse_prune.hash) then
    raise exception 'entry % of the file is not that of the log', last using errcode = 'invalid_parameter_value',
      hint = 'Give number and hash of the last entry of a file that was exported from this log.', constraint = 'export';
  end if;
  -- By the log's own time: a clock that jumped ahead makes nothing old that was written before.
  select least(a.at, clock_timestamp()) - v_keep into v_until
  from rekey.audit_log a where a.id = (checkpoint -> 'checkpoint' ->> 'id')::bigint;
  if v_until is null or exists (select from rekey.audit_log a where a.id > v_start and a.id <= last and a.at >= v_until) then
    raise exception 'entries up to % are not older than % before the checkpoint', last, v_keep using errcode = 'RK006',
      hint = 'The setting audit_keep says how long entries stay. Export fewer of them, or wait.';
  end if;
  if not exists (select from rekey.audit_log a where a.id > v_start and a.id <= last and not rekey._is_kept(a.event)) then
    raise exception 'up to entry % there is nothing to remove', last using errcode = 'RK006',
      hint = 'Entries key.*, kek.* and audit.pruned stay for ever. Export more of them, or wait.';
  end if;
end
$$;
comment on function rekey._refuse_prune is 'Refuses a removal from the audit log that rekey.prune_audit_log() may not do: RK006, 22023.';

create or replace function rekey.prune_audit_log(first bigint, last bigint, hash text, file_sha256 text, checkpoint jsonb) returns bigint
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_start bigint := (rekey._audit_start()).last;
  v_kept record;
  v_removed bigint;
begin
  perform rekey._refuse_snapshot();
  if not coalesce(first > 0 and last >= first and hash ~ '^[0-9a-f]{64}$' and file_sha256 ~ '^[0-9a-f]{64}$', false) then
    raise exception 'number, hash and file are not told' using errcode = 'invalid_parameter_value',
      hint = 'Give the first and last entry of an export, the hash of the last and the SHA-256 of the file, in hexadecimal: pg-rekey audit prune does.', constraint = 'export';
  end if;
  if not coalesce(checkpoint -> 'checkpoint' ->> 'id' ~ '^\d{1,18}$' and checkpoint -> 'checkpoint' ->> 'hash' ~ '^[0-9a-f]{64}$'
      and checkpoint ->> 'signature' <> '' and octet_length(checkpoint::text) <= 1000
      and (checkpoint -> 'checkpoint' ->> 'id')::bigint >= last, false) then
    raise exception 'there is no signed checkpoint from after entry %', last using errcode = 'invalid_parameter_value',
      hint = 'Export with a key that signs: pg-rekey audit export FILE --key KEY.', constraint = 'export';
  end if;
  perform rekey._refuse_prune(first, last, hash, checkpoint);
  -- Only now, since looking at the log takes a while. What it was found to be it stays, but for another removal.
  perform from rekey._audit_head for update;
  if (rekey._audit_start()).last <> v_start then
    raise exception 'entries were removed by another session meanwhile' using errcode = 'RK006',
      hint = 'Export what follows them: pg-rekey audit export.', constraint = 'export';
  end if;
  v_kept := rekey._kept_hash(last);
  update rekey._audit_head set pruning = pg_current_xact_id() where singleton;
  delete from rekey.audit_log a where a.id <= last and not rekey._is_kept(a.event);
  get diagnostics v_removed = row_count;
  update rekey._audit_head set pruning = null where singleton;
  perform rekey._audit('audit.pruned', details => jsonb_build_object(
    'first', first, 'last', last, 'hash', hash, 'removed', v_removed, 'kept', v_kept.kept, 'kept_hash', v_kept.hash,
    'file_sha256', file_sha256, 'checkpoint', checkpoint));
  return v_removed;
end
$$;
comment on function rekey.prune_audit_log is
  'Removes entries from the audit log that are in a file now (pg-rekey audit export, pg-rekey audit prune), and returns how many. first, last: numbers of the first and the last entry in the file; hash: hash of the last one. file_sha256: SHA-256 of the file, in hexadecimal. checkpoint: a signed checkpoint from after that entry; who calls checks its signature. All must be older than the setting audit_keep before the checkpoint. Entries key.*, kek.* and audit.pruned stay. Leaves audit.pruned, from which rekey.verify_audit_log() goes on. A right of its own: the owner of the function, or a superuser, grants EXECUTE on it, and no role of pg_rekey has it. 22023 for arguments that cannot be or are not of this log; RK006 where entries are too new, were removed already, or the log does not hold; 25001 outside READ COMMITTED.';
