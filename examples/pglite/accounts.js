// The application: API keys of accounts, stored encrypted and read through the decrypted view. `db` has query(), as
// PGlite and node-postgres have it.

export const schema = `
  create table accounts (id int primary key, api_key text);
  select rekey.protect_column('accounts', 'api_key', encrypt_on_write => true);
  select rekey.create_decrypted_view('accounts');
`

export async function setApiKey(db, id, apiKey) {
  await db.query(
    'insert into accounts values ($1, $2) on conflict (id) do update set api_key = excluded.api_key',
    [id, apiKey]
  )
}

export async function getApiKey(db, id) {
  const { rows } = await db.query('select api_key from accounts_decrypted where id = $1', [id])
  return rows[0]?.api_key
}
