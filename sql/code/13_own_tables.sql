-- Our own tables are as we made them, or nothing goes on. What hides rows of them from rekey_owner would make them count as
-- absent. (footer.sql has every definer function of rekey_owner run with row_security off, which makes PostgreSQL raise where a
-- policy would hide rows. This says it before that, in words, and finds what PostgreSQL does not mind.)

create or replace function rekey._table_problem(relation regclass) returns text
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  select case
    when c.relforcerowsecurity then
      format('FORCE ROW LEVEL SECURITY hides rows of %s from pg_rekey: ALTER TABLE %1$s NO FORCE ROW LEVEL SECURITY', c.oid::regclass)
    when pg_get_userbyid(c.relowner) <> 'rekey_owner' then
      format('%s belongs to %s: ALTER TABLE %1$s OWNER TO rekey_owner', c.oid::regclass, c.relowner::regrole)
    when c.relhassubclass and exists (select from pg_inherits i where i.inhparent = c.oid) then
      format('tables inherit from %s: ALTER TABLE ... NO INHERIT %1$s', c.oid::regclass)
    else coalesce(
      (select format('policy %I of %s is not pg_rekey''s: DROP POLICY %1$I ON %2$s', p.polname, c.oid::regclass)
       from pg_policy p
       where p.polrelid = c.oid and not (p.polpermissive and p.polcmd = 'r' and (c.relname, p.polname) in (
         ('secrets', 'secrets_tenant'), ('keyrings', 'keyrings_tenant'), ('keyrings', 'keyrings_all')))
       limit 1),
      (select format('rule %I of %s is not pg_rekey''s: DROP RULE %1$I ON %2$s', r.rulename, c.oid::regclass)
       from pg_rewrite r where r.ev_class = c.oid limit 1))
    end
  from pg_class c where c.oid = relation;
end;
comment on function rekey._table_problem is 'What hides or changes rows of a table of ours, and what to do about it; NULL: nothing.';

create or replace function rekey._own_problem() returns text
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  select min(rekey._table_problem(c.oid::regclass))
  -- (By what the schema has: where there are many tables, a search of pg_class takes long.)
  from pg_depend d join pg_class c on d.classid = 'pg_class'::regclass and c.oid = d.objid and c.relkind in ('r', 'p')
  where d.refclassid = 'pg_namespace'::regclass and d.refobjid = 'rekey'::regnamespace;
end;
comment on function rekey._own_problem is 'As rekey._table_problem(), of the first of our tables that has one.';

create or replace function rekey._refuse_hidden() returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_problem text := rekey._own_problem();
begin
  if v_problem is not null then
    raise exception '%', v_problem using errcode = 'RK005', hint = 'What is hidden would count as absent: nothing goes on until that is done.', constraint = 'own_tables';
  end if;
end
$$;
comment on function rekey._refuse_hidden is 'RK005 where a table of ours is not as we made it, so that rows may be hidden.';
