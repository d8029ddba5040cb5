-- Roles belong to the whole cluster: a second database uses the ones that are there, if they are what they should be.
do $$
declare
  v_role record;
  v_found pg_roles;
  v_member name;
  v_super boolean := (select rolsuper from pg_roles where rolname = current_user);
begin
  for v_role in
    select r.name, r.login, r.owns
    from (values ('rekey_owner', false, true), ('rekey_sweeper', false, true),
                 ('rekey_admin', false, false), ('rekey_operator', false, false),
                 ('rekey_auditor', false, false), ('rekey_app', false, false),
                 ('rekey_worker', true, false)) as r(name, login, owns)
    where v_super or r.name <> 'rekey_worker'
  loop
    select * into v_found from pg_roles where rolname = v_role.name;
    if not found then
      execute format('create role %I %s', v_role.name, case when v_role.login then 'login' else 'nologin' end);
    elsif v_found.rolsuper or v_found.rolcreaterole or v_found.rolcreatedb or v_found.rolreplication
          or v_found.rolbypassrls or v_found.rolcanlogin <> v_role.login then
      raise exception 'role % exists and is not what pg_rekey needs', v_role.name
        using errcode = 'invalid_role_specification',
              hint = format('It must be %s, and neither SUPERUSER, CREATEROLE, CREATEDB, REPLICATION nor BYPASSRLS.',
                            case when v_role.login then 'LOGIN' else 'NOLOGIN' end);
    end if;
    if v_role.owns then
      select m.member::regrole::name into v_member
      from pg_auth_members m
      where m.roleid = v_role.name::regrole and m.member <> current_user::regrole
      limit 1;
      if found then
        raise exception 'role % has the member %', v_role.name, v_member
          using errcode = 'invalid_role_specification',
                hint = format('It must have none: REVOKE %I FROM %I, or install as %I.', v_role.name, v_member, v_member);
      end if;
      if exists (select from pg_auth_members m where m.member = v_role.name::regrole) then
        raise exception 'role % is a member of other roles', v_role.name
          using errcode = 'invalid_role_specification', hint = 'It must be a member of none: revoke those memberships.';
      end if;
    end if;
    if not v_super then
      -- From PostgreSQL 16 on, whoever makes a role administers it, and cannot give that to himself.
      execute format('grant %I to current_user%s', v_role.name, case when exists (
        select from pg_auth_members m
        where m.roleid = v_role.name::regrole and m.member = current_user::regrole and m.admin_option
      ) then '' else ' with admin option' end);
    end if;
  end loop;
  for v_role in
    select g.role, g.member
    from (values ('rekey_operator', 'rekey_admin'), ('rekey_auditor', 'rekey_admin'), ('rekey_operator', 'rekey_worker')) as g(role, member)
    where (v_super or g.member <> 'rekey_worker')
      and not exists (select from pg_auth_members m where m.roleid = g.role::regrole and m.member = g.member::regrole)
  loop
    execute format('grant %I to %I', v_role.role, v_role.member);
  end loop;
end
$$;

create schema rekey;
comment on schema rekey is 'pg_rekey: encryption keys, their rotation, and the secrets they protect. Objects whose name starts with _ are private.';
grant usage on schema rekey to rekey_admin, rekey_operator, rekey_auditor, rekey_app, rekey_sweeper;

create schema rekey_targets;
comment on schema rekey_targets is 'pg_rekey: for each protected table its sweep and count functions, owned by the owner of the table.';
grant usage on schema rekey_targets to rekey_sweeper;
