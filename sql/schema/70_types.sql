create type rekey.key_rows as (keyring text, version integer, state text, rows bigint, relations text[]);
comment on type rekey.key_rows is 'Result of rekey.key_usage(): rows that stand on a key version, and the relations they are in.';

create type rekey.verified_rows as (relation text, keyring text, version integer, rows bigint, failed bigint);
comment on type rekey.verified_rows is 'Result of rekey.verify_ciphertexts(): rows of a relation on a key version, and how many of them do not open.';

create type rekey._sealing as (header bytea, key bytea);
comment on type rekey._sealing is 'What a value is sealed with: the header of its envelope, and the DEK.';

create type rekey._sealed as (ciphertexts bytea[], problems text[], formats text[], closed bytea[], indexes bytea[]);
comment on type rekey._sealed is 'What the engine made of values, in their order: the ciphertext, and the index value of a searchable column; or NULL and why not; or NULL, and what only the client can open.';

create type rekey._target as (
  target text, relation regclass, whole regclass, function_name name, indexed boolean, prefix bytea, is_text boolean, problem text,
  normalization text);
comment on type rekey._target is 'A relation with row storage that holds envelopes, and what the engine needs to know of it. whole: the table that it is, or is a partition of. normalization: of a searchable column.';

create type rekey._counted as (
  place integer, keyring_id integer, version integer, rows bigint, next tid, ciphertexts bytea[], contexts bytea[], keys text[], error text, code text, context text);
comment on type rekey._counted is 'Rows of a relation on a key version, as rekey._call_count() counts them, or the rows themselves; or the error, its SQLSTATE and context, with which it could not be counted. place: which of the relations.';

create type rekey._locked as (functions text, targets rekey._target[], errors jsonb);
comment on type rekey._locked is 'What rekey._lock_targets() locked: the targets, blocked ones among them, as they were then; what could not be locked (target, relation, error, sqlstate); and the state of all their functions before that.';

create type rekey._adoption as (
  relation regclass, rows tid[], keys text[], formats text[], problems text[], ciphertexts bytea[], legacy bytea[], next tid, next_relation regclass,
  indexes bytea[]);
comment on type rekey._adoption is 'A batch of values that are no envelopes: by row, its key, the format, why it cannot be adopted, the envelope made of it, or the value that the client has to open.';
