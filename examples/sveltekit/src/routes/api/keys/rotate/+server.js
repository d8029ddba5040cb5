// This server lends nobody its rights: the caller's own token goes on to Supabase, so that the database decides who may
// rotate, and its audit log names him.

import { createClient } from '@supabase/supabase-js'
import { json } from '@sveltejs/kit'
import { env } from '$env/dynamic/public'

const OPTIONS = { keyring: 'string', reason: 'string', supersede: 'boolean' }

/** Begin a rotation. @type {import('./$types').RequestHandler} */
export async function POST({ request }) {
  return call(request, 'rotate_keys', { options: await read(request), success: 202 })
}

/** Say how rotation stands. @type {import('./$types').RequestHandler} */
export async function GET({ request }) {
  return call(request, 'key_rotation_status', { options: {}, success: 200 })
}

async function call(request, name, { options, success }) {
  const authorization = request.headers.get('authorization') ?? ''
  if (!/^Bearer \S+$/i.test(authorization)) {
    return problem(401, '42501', 'no access token', 'Send the session\'s access_token as "Authorization: Bearer ...".')
  }
  if (!options) {
    return problem(400, '22023', 'the body cannot be', 'It is JSON: {"keyring": text, "reason": text, "supersede": boolean}.')
  }
  // A client for each request, and no session in it: on a server, one caller must never act as another.
  const supabase = createClient(env.PUBLIC_SUPABASE_URL, env.PUBLIC_SUPABASE_PUBLISHABLE_KEY, {
    auth: { persistSession: false, autoRefreshToken: false },
    global: { headers: { Authorization: authorization } }
  })
  const { data, error, status } = await supabase.rpc(name, options)
  if (!error) return json(data, { status: success })
  if (status === 0) {
    return problem(503, '08006', 'Supabase does not answer', 'A rotation may have begun: GET tells, before you try again.')
  }
  return problem(status, error.code, error.message, error.hint)
}

/** Return the options in the body, or null: an option that is misspelt must not rotate every keyring. */
async function read(request) {
  try {
    const options = JSON.parse((await request.text()) || '{}')
    const known = Object.entries(options).every(([name, value]) => typeof value === OPTIONS[name])
    return known && options.constructor === Object ? options : null
  } catch {
    return null
  }
}

function problem(status, code, message, hint) {
  return json({ code, message, hint }, { status })
}
