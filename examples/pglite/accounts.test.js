import assert from 'node:assert/strict'
import { after, before, beforeEach, test } from 'node:test'
import { PGlite } from '@electric-sql/pglite'
import { pgcrypto } from '@electric-sql/pglite/contrib/pgcrypto'
import { sql } from 'pg-rekey'
import { getApiKey, schema, setApiKey } from './accounts.js'

const one = async (query) => Object.values((await db.query(query)).rows[0])[0]
const kek = crypto.getRandomValues(new Uint8Array(32))
let db

before(async () => {
  db = await PGlite.create({ extensions: { pgcrypto } })
  await db.exec('create extension pgcrypto')
  await db.transaction((tx) => tx.exec(sql))
  await db.query("select rekey.unlock($1, 'session')", [kek])
  await db.exec("select rekey.register_kek(); select rekey.create_keyring('default')")
  await db.exec(schema)
})

beforeEach(() => db.exec('truncate accounts'))

after(() => db.close())

test('a key is stored encrypted, and read', async () => {
  await setApiKey(db, 1, 'sk_live_1')
  assert.match(await one('select api_key from accounts'), /^rk1:/)
  assert.equal(await getApiKey(db, 1), 'sk_live_1')
  assert.equal(await getApiKey(db, 2), undefined)
})

test('a rotation re-encrypts everything, and nothing changes for the application', async () => {
  for (let id = 1; id <= 100; id++) await setApiKey(db, id, `sk_live_${id}`)
  const before = await one('select api_key from accounts where id = 7')
  const { rows: [{ id: rotation }] } = await db.query('select id from rekey.rotate_keys()')
  await db.exec("call rekey.run_rotations('1 minute')")
  const { rows } = await db.query(
    'select state, rows_done, rows_failed from rekey.rotation_status where id = $1', [rotation]
  )
  assert.deepEqual(rows, [{ state: 'completed', rows_done: 100, rows_failed: 0 }])
  assert.notEqual(await one('select api_key from accounts where id = 7'), before)
  for (let id = 1; id <= 100; id++) assert.equal(await getApiKey(db, id), `sk_live_${id}`)
  assert.equal(await one('select sum(failed)::int from rekey.verify_ciphertexts()'), 0)
})

test('a value that was moved to another row does not open', async () => {
  await setApiKey(db, 1, 'sk_live_1')
  await assert.rejects(db.query('insert into accounts select 2, api_key from accounts'), { code: 'RK003' })
})

test('without the KEK nothing opens', async () => {
  await setApiKey(db, 1, 'sk_live_1')
  await db.exec('select rekey.lock()')
  await assert.rejects(getApiKey(db, 1), { code: 'RK001' })
  await db.query("select rekey.unlock($1, 'session')", [kek])
  assert.equal(await getApiKey(db, 1), 'sk_live_1')
})

test('the audit log has the rotation', async () => {
  const { rows: [{ id: rotation }] } = await db.query("select id from rekey.rotate_keys(reason => 'quarterly')")
  await db.exec("call rekey.run_rotations('1 minute')")
  assert.equal(await one('select (rekey.verify_audit_log()).valid'), true)
  const { rows } = await db.query('select event from rekey.audit_log where rotation_id = $1 order by id', [rotation])
  assert.deepEqual([rows[0].event, rows.at(-1).event], ['rotation.requested', 'rotation.completed'])
})
