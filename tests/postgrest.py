"""Calls of functions exactly as PostgREST makes them: a stand-in for its binary, which cannot be had here.

After PostgREST 12 and 13: one transaction for each request, READ ONLY unless a volatile function is called
by POST; `set_config` of search_path, role, claims, method, path and headers, and of the role's own settings;
then one SELECT that calls the function with named arguments from the JSON body and reads `response.status`.
"""

import base64
import hashlib
import hmac
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

SECRET = b"super-secret-jwt-token-with-at-least-32-characters"
CONTEXT = """
select set_config('search_path', '"public", "extensions"', true), set_config('role', %(role)s, true),
  set_config('request.jwt.claims', %(claims)s, true), set_config('request.method', %(method)s, true),
  set_config('request.path', %(path)s, true), set_config('request.headers', %(headers)s, true),
  set_config('request.cookies', '{}', true)"""
CALL = """
with pgrst_source as (
  select pgrst_call.pgrst_scalar
  from (select %s::json as json_data) pgrst_payload,
    lateral (select * from json_to_record(pgrst_payload.json_data) as _({columns})) pgrst_body,
    lateral (select {function}({arguments}) as pgrst_scalar) pgrst_call
)
select coalesce(json_agg(_postgrest_t.pgrst_scalar) -> 0, 'null')::text as body,
  nullif(current_setting('response.status', true), '') as response_status
from (select pgrst_source.* from pgrst_source) _postgrest_t"""
FUNCTION = """
select p.provolatile = 'v', array_agg(t.name order by t.place) filter (where t.name = any (%(given)s)),
  array_agg(format_type(t.type, null) order by t.place) filter (where t.name = any (%(given)s))
from pg_proc p
left join lateral unnest(p.proargnames, p.proargtypes::oid[]) with ordinality as t(name, type, place) on true
where p.pronamespace = 'public'::regnamespace and p.proname = %(name)s
group by p.oid
having coalesce(array_agg(t.name), '{}') @> %(given)s"""
ROLE_SETTINGS = """
select r.rolname, split_part(s.setting, '=', 1), substr(s.setting, strpos(s.setting, '=') + 1)
from pg_db_role_setting d
join pg_roles r on r.oid = d.setrole
cross join unnest(d.setconfig) as s(setting)
where d.setdatabase = 0"""
# By the first characters of an SQLSTATE; https://docs.postgrest.org/en/v12/references/errors.html
STATUS = {
    "08": 503,
    "25006": 405,
    "25": 500,
    "40": 500,
    "42501": 403,
    "42883": 404,
    "53": 503,
    "55": 500,
    "57": 500,
}


@dataclass
class Response:
    """What a client gets."""

    status: int
    body: Any


class PostgREST:
    """PostgREST in front of a database, connected as authenticator."""

    def __init__(self, dsn: str) -> None:
        """Connect, and read the settings of the API roles as PostgREST does when it starts."""
        self._dsn = make_conninfo(dsn, user="authenticator")
        with psycopg.connect(self._dsn) as connection:
            self._settings = connection.execute(ROLE_SETTINGS).fetchall()

    def rpc(
        self,
        name: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        role: str = "anon",
        claims: Mapping[str, Any] | None = None,
        method: str = "POST",
    ) -> Response:
        """Call a function of schema public as a role, with the claims of its JWT."""
        given = dict(arguments or {})
        with psycopg.connect(self._dsn) as connection:
            found = connection.execute(FUNCTION, {"name": name, "given": list(given)}).fetchone()
            connection.rollback()
            if found is None:
                return Response(
                    404, {"code": "PGRST202", "message": f"Could not find the function public.{name}"}
                )
            volatile, names, types = found
            connection.read_only = not (volatile and method == "POST")
            connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
            try:
                return self._call(
                    connection,
                    name,
                    dict(zip(names or [], types or [], strict=True)),
                    given,
                    role,
                    claims,
                    method,
                )
            except psycopg.Error as error:
                return _problem(error, role)

    def _call(
        self,
        connection: psycopg.Connection[Any],
        name: str,
        types: Mapping[str, str],
        given: Mapping[str, Any],
        role: str,
        claims: Mapping[str, Any] | None,
        method: str,
    ) -> Response:
        context = {
            "role": role,
            "claims": json.dumps({"role": role, **(claims or {})}),
            "method": method,
            "path": f"/rpc/{name}",
            "headers": json.dumps({"host": "localhost", "user-agent": "tests"}),
        }
        connection.execute(CONTEXT, context)
        for owner, setting, text in self._settings:
            if owner == role:
                connection.execute("select set_config(%s, %s, true)", [setting, text])
        call = sql.SQL(CALL).format(
            columns=sql.SQL(", ").join(
                sql.SQL("{} {}").format(sql.Identifier(one), sql.SQL(types[one])) for one in types
            )
            if types
            else sql.SQL('"_" text'),
            function=sql.Identifier("public", name),
            arguments=sql.SQL(", ").join(
                sql.SQL("{0} := pgrst_body.{0}").format(sql.Identifier(one)) for one in types
            ),
        )
        row = connection.execute(call, [json.dumps(given)]).fetchone()
        connection.commit()
        assert row is not None
        body, status = row
        return Response(int(status or 200), json.loads(body))


def _problem(error: psycopg.Error, role: str) -> Response:
    code = error.sqlstate or ""
    status = next((STATUS[code[:n]] for n in (5, 2) if code[:n] in STATUS), 400)
    if code == "42501" and role == "anon":
        status = 401
    diag = error.diag
    body = {
        "code": code,
        "message": diag.message_primary,
        "details": diag.message_detail,
        "hint": diag.message_hint,
    }
    return Response(status, body)


def token(**claims: Any) -> str:
    """Return a JWT with these claims, signed as a project signs its own."""
    parts = [json.dumps(part).encode() for part in ({"alg": "HS256", "typ": "JWT"}, claims)]
    text = b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in parts)
    return f"{text.decode()}.{_signature(text)}"


def _signature(text: bytes) -> str:
    return base64.urlsafe_b64encode(hmac.digest(SECRET, text, hashlib.sha256)).rstrip(b"=").decode()


def _claims(jwt: str) -> dict[str, Any] | None:
    """Return the claims of a JWT whose signature is right."""
    text, _, signature = jwt.rpartition(".")
    if not hmac.compare_digest(signature, _signature(text.encode())):
        return None
    payload = text.partition(".")[2]
    claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    return claims


@contextmanager
def serve(dsn: str) -> Iterator[str]:
    """Answer POST /rest/v1/rpc/NAME on a loopback port as a project does; yield its URL."""
    behind = PostgREST(dsn)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            given = json.loads(self.rfile.read(length) or b"{}")
            jwt = (self.headers.get("authorization") or "").removeprefix("Bearer ")
            claims = _claims(jwt) if jwt else {"role": "anon"}
            if claims is None:
                answer = Response(401, {"code": "PGRST301", "message": "JWSError JWSInvalidSignature"})
            else:
                name = self.path.removeprefix("/rest/v1/rpc/")
                answer = behind.rpc(name, given, role=claims["role"], claims=claims)
            body = json.dumps(answer.body).encode()
            self.send_response(answer.status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
