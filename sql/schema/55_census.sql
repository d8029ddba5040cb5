-- What rekey.protected_columns.seen is for a column.
create table rekey._secrets_seen (
  keyring_id integer constraint _secrets_seen_pkey primary key constraint _secrets_seen_keyring_fkey references rekey.keyrings,
  rows bigint not null
);
comment on table rekey._secrets_seen is 'How many secrets of a keyring the last complete count saw: where there are none any more, a rotation asks whether that is meant.';

create table rekey._census_findings (
  kind text not null,
  target text not null,
  keyring text not null default '',
  version integer not null default 0,
  item text not null,
  severity text not null,
  rows bigint,
  finding text not null,
  advice text not null,
  since timestamptz not null default now(),
  constraint _census_findings_pkey primary key (kind, target, keyring, version, item)
);
comment on table rekey._census_findings is 'What the last census found, and since when; what it does not find any more is not here.';
