create table rekey.audit_log (
  id bigint constraint audit_log_pkey primary key,
  at timestamptz not null,
  actor text not null,
  role text not null,
  jwt_subject text,
  event text not null constraint audit_log_event_check check (event in (
    'keyring.created', 'keyring.retired', 'keyring.emptied', 'census.found',
    'key.created', 'key.activated', 'key.deactivated', 'key.disabled', 'key.enabled', 'key.compromised',
    'key.destroy_scheduled', 'key.destroy_cancelled', 'key.destroyed',
    'rotation.requested', 'rotation.passed_by', 'rotation.started', 'rotation.error', 'rotation.row_failed', 'rotation.failure_resolved',
    'rotation.retried', 'rotation.paused', 'rotation.resumed', 'rotation.rolled_back', 'rotation.completed', 'rotation.failed',
    'kek.registered', 'kek.rotated', 'kek.lost', 'column.protected', 'column.rebound', 'column.unprotected', 'column.searchable', 'column.refilled',
    'schedule.changed', 'setting.changed', 'endpoint.added', 'endpoint.removed', 'access.denied', 'audit.pruned')),
  keyring text,
  version integer,
  rotation_id bigint,
  details jsonb not null default '{}',
  prev_hash bytea not null,
  hash bytea not null
);
comment on table rekey.audit_log is 'What happened to keys, in a hash chain. Rows are only ever added; rekey.verify_audit_log() checks it. Only rekey.prune_audit_log() removes old ones, which it leaves an entry of.';
comment on column rekey.audit_log.id is 'Number in the chain, from 1, without gaps but for those that audit.pruned tells of.';
comment on column rekey.audit_log.at is 'When.';
comment on column rekey.audit_log.actor is 'The role that logged in (session_user).';
comment on column rekey.audit_log.role is 'The role it had set (SET ROLE), or none.';
comment on column rekey.audit_log.jwt_subject is 'Subject of the JWT, behind PostgREST; at most 255 bytes of it.';
comment on column rekey.audit_log.event is 'What happened.';
comment on column rekey.audit_log.keyring is 'Keyring it happened to.';
comment on column rekey.audit_log.version is 'Key version it happened to; for kek events the number of the KEK.';
comment on column rekey.audit_log.rotation_id is 'Rotation it happened in.';
comment on column rekey.audit_log.details is 'More of it, at most about 16 kB: what is longer is cut. Never a key or a value.';
comment on column rekey.audit_log.prev_hash is 'Hash of the entry before.';
comment on column rekey.audit_log.hash is 'SHA-256 over prev_hash and every other column (docs/format.md).';

-- What those who may not administer can cause is limited by how much of it there was in the last minute.
create index audit_log_limited on rekey.audit_log (at) where event in ('access.denied', 'rotation.error');

-- Its row lock puts the writers of the chain in a row, at any isolation level.
create table rekey._audit_head (
  singleton boolean constraint _audit_head_pkey primary key default true constraint _audit_head_singleton_check check (singleton),
  id bigint not null,
  hash bytea not null,
  pruning xid8
);
comment on table rekey._audit_head is 'One row: number and hash of the last entry of the audit log. pruning: the transaction that may remove entries, while rekey.prune_audit_log() does; NULL in every committed state.';
