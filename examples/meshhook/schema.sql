-- A multi-tenant product as it is before pg_rekey, in the shape of MeshHook: projects, their secrets, row-level security.
create table public.projects (
  id uuid primary key default gen_random_uuid(),
  owner_id uuid not null,
  name text not null
);

create table public.secrets (
  id uuid primary key default gen_random_uuid(),
  project_id uuid not null references public.projects on delete cascade,
  key text not null,
  value_encrypted bytea not null,
  created_at timestamptz not null default now(),
  updated_at timestamptz not null default now(),
  unique (project_id, key)
);

create table public.audit_log (
  id bigint primary key generated always as identity,
  user_id uuid not null,
  project_id uuid,
  action text not null,
  at timestamptz not null default now()
);

create function public.user_project_ids() returns setof uuid
language sql stable security definer set search_path = '' as $$
  select p.id from public.projects p where p.owner_id = auth.uid()
$$;

alter table public.projects enable row level security;
alter table public.secrets enable row level security;
alter table public.audit_log enable row level security;
create policy own_projects on public.projects to authenticated using (owner_id = auth.uid()) with check (owner_id = auth.uid());
create policy own_secrets on public.secrets to authenticated
  using (project_id in (select public.user_project_ids())) with check (project_id in (select public.user_project_ids()));
create policy own_entries on public.audit_log for select to authenticated using (user_id = auth.uid());

create function public.set_updated_at() returns trigger language plpgsql set search_path = '' as $$
begin
  new.updated_at := now();
  return new;
end
$$;
create trigger secrets_updated_at before update on public.secrets for each row execute function public.set_updated_at();

create function public.log_secret_change() returns trigger language plpgsql security definer set search_path = '' as $$
begin
  insert into public.audit_log (user_id, project_id, action) values (auth.uid(), new.project_id, tg_op || ' secret ' || new.key);
  return new;
end
$$;
create trigger secrets_log after insert or update on public.secrets for each row execute function public.log_secret_change();
