create type rekey.key_rows as (keyring text, version integer, state text, rows bigint, relations text[]);
comment on type rekey.key_rows is 'Result of rekey.key_usage(): rows that stand on a key version, and the relations they are in.';

create type rekey.verified_rows as (relation text, keyring text, version integer, rows bigint, failed bigint);
comment on type rekey.verified_rows is 'Result of rekey.verify_ciphertexts(): rows of a relation on a key version, and how many of them do not open.';
