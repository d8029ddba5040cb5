-- What brings pg_rekey in. The migration of pg_rekey and a KEK come before (docs/supabase.md, steps 1 to 3).

-- A rotation updates rows as the owner of the table: nobody's change, and no user's.
create or replace trigger secrets_updated_at before update on public.secrets for each row
  when (not rekey.is_sweeping('public.secrets')) execute function public.set_updated_at();
create or replace trigger secrets_log after insert or update on public.secrets for each row
  when (not rekey.is_sweeping('public.secrets')) execute function public.log_secret_change();

-- Tenants are projects, and their owner decides.
create function public.is_project_owner(project_id uuid) returns boolean
language sql stable security definer set search_path = '' as $$
  select exists (select from public.projects p where p.id = is_project_owner.project_id and p.owner_id = auth.uid())
    -- The keyrings of all tenants' use.
    or is_project_owner.project_id = '00000000-0000-0000-0000-000000000000'
$$;
revoke all on function public.is_project_owner from public, anon, authenticated, service_role;
grant execute on function public.is_project_owner to rekey_sweeper;
grant usage on schema public to rekey_sweeper;
select rekey.set_setting('tenant_check', 'public.is_project_owner');

-- The API upserts on (project_id, key), with ids that the table makes: so that key is what values are bound to, not the id.
select rekey.protect_column('public.secrets', 'value_encrypted', context_columns => '{project_id,key}', encrypt_on_write => true);

-- What the API reads: the same rows under the same policies, opened.
select rekey.create_decrypted_view('public.secrets');
revoke all on public.secrets_decrypted from public, anon;
grant select on public.secrets_decrypted to authenticated, service_role;
grant rekey_app to authenticated, service_role;

-- What is there already becomes encrypted, while the API goes on.
select rekey.adopt_column('public.secrets', 'value_encrypted', reason => 'pg_rekey comes in');
