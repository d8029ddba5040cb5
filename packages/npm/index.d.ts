/** The version of pg_rekey. */
export declare const version: string

/** The whole installation, to be run in one transaction, in a database with pgcrypto. */
export declare const sql: string

/** A row of rekey.rotation_status, as drivers of JavaScript return it; bigint as number or text. */
export interface RotationStatus {
  id: number | string
  keyring: string
  tenant_id: string
  state:
    | 'queued' | 'running' | 'verifying' | 'paused' | 'completed' | 'completed_with_failures'
    | 'failed' | 'rolled_back' | 'superseded'
  from_versions: number[]
  to_version: number | null
  rows_total: number | string | null
  rows_done: number | string
  rows_failed: number | string
  attempts: number
  last_error: string | null
  created_at: Date
  started_at: Date | null
  finished_at: Date | null
}

/** A row of rekey.key_status. */
export interface KeyStatus {
  keyring: string
  version: number
  state: 'active' | 'decrypt_only' | 'disabled' | 'compromised' | 'destroy_scheduled' | 'destroyed'
}

/** A row of rekey.verify_ciphertexts(). */
export interface Verification {
  relation: string
  keyring: string
  version: number
  rows: number | string
  failed: number | string
}
