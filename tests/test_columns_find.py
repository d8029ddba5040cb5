"""`pg-rekey columns find`: what was forgotten, by name, by shape, and within JSON."""

from typing import LiteralString

import pytest
from cryptography.fernet import Fernet

from cli_fixtures import Cli
from helpers import Connection, value

pytest_plugins = ["cli_fixtures"]


@pytest.fixture
def columns(cli_ready: Cli) -> Cli:
    """The command line, with a KEK and a database."""
    return cli_ready


# Names that public schemas have (Prisma, TypeORM, Sequelize, Hibernate, Rails, Django), and by hand.
# fmt: off
SECRET_NAMES = [
    "accessToken", "refreshToken", "clientSecret", "webhookSecret", "totpSecret", "smtpPass", "bearer",
    "pat", "credentials", "access_token", "ACCESS_TOKEN", "AccessToken", "accesstoken", "refreshtoken",
    "id_token", "idToken", "apiKey", "APIKey", "api_key", "apikey", "privateKey", "secretAccessKey",
    "aws_secret_access_key", "passwd", "password", "Password", "userPassword", "user_pwd", "pwd",
    "passphrase", "db_pass", "dbPass", "smtp_password", "smtppass", "imapPass", "github_pat", "githubPAT",
    "gitlabPat", "bearerToken", "jwt", "sessionToken", "csrfToken", "authToken", "oauthToken", "OAuthToken",
    "oauth_token_secret", "consumerSecret", "signing_key", "signingSecret", "encryptionKey",
    "encryption_key", "master_key", "sshPrivateKey", "ssh_key", "serviceRoleKey", "service_key",
    "deploy_key", "hmacKey", "sharedSecret", "shared_key", "recovery_codes", "recoveryCodes", "backupCodes",
    "seedPhrase", "mnemonic", "otp_secret", "two_factor_secret", "mfaSecret", "totp", "creds", "dbCreds",
    "credential", "googleCredentials", "awsCredentials", "encryptedKey", "encrypted_password", "cvv", "cvc",
    "token_github", "secret_stripe", "password_smtp", "token", "secret", "secrets", "tokens", "pass",
    "stripe_secret_live", "apiToken2", "access-token", "access token", "Client Secret", "API key",
    "user password", "smtp pass",
]
OTHER_NAMES = [
    "pattern", "compass", "token_count", "tokenCount", "tokenizer", "tokenized", "tokenType", "token_type",
    "tokenExpiresAt", "token_expires_at", "tokenExpiry", "passwordResetAt", "password_changed_at",
    "passwordHash", "password_hash", "token_hash", "passwordHint", "has_password", "isSecret", "secretary",
    "secret_id", "secret_name", "secretName", "secretArn", "secret_ref", "credential_id", "credentialType",
    "password_policy", "passwordless", "passport", "passport_number", "passenger", "boarding_pass",
    "bypass", "max_tokens", "maxTokens", "prompt_tokens", "completion_tokens", "totalTokens", "inputTokens",
    "next_page_token", "pageToken", "syncToken", "tokens_used", "token_symbol", "token_address",
    "token_endpoint", "token_url", "key", "keys", "foreign_key", "primaryKey", "sort_key", "public_key",
    "publicKey", "sshPublicKey", "credential_public_key", "keyboard", "monkey", "turkey", "keyword",
    "keywords", "hotkey", "path", "patch", "patient", "patent", "spatial", "compat", "bearing", "beard",
    "forbearer_id", "description", "status", "name", "email", "author", "authority", "expass", "overpass",
    "secretion", "credit", "creditor", "jwtless", "opt", "option", "potpourri", "cvs", "certificate",
    "license", "apiKeyId", "access_key_id", "api_key_prefix", "token_last_used_at", "secret_question",
    "password_strength", "passage", "tokenId", "title", "passing", "passwords_count", "data", "value",
]
# fmt: on


def test_find_knows_the_names_of_secrets(ready: Connection) -> None:
    """Every name of the one list, and none of the other."""
    ready.execute("set role rekey_auditor")
    for names, telling in ((SECRET_NAMES, True), (OTHER_NAMES, False)):
        missed: LiteralString = (
            "select coalesce(array_agg(n), '{}') from unnest(%s::text[]) n"
            " where rekey._sounds_secret(n) is distinct from %s"
        )
        assert value(ready, missed, names, telling) == []
    ready.execute("reset role")


def test_find_looks_at_what_orms_and_json_call_secrets(columns: Cli, ready: Connection) -> None:
    ready.execute("""
        create domain sealed as text;
        create table "Account" (id text primary key, "accessToken" text, "webhook secret" varchar,
          "smtp-pass" char(20), "apiKeys" text[], "totpSecret" sealed, "private_key" bytea[], pattern text,
          "tokenCount" text, settings jsonb, raw json, credentials jsonb, plain jsonb, hashed jsonb);
        insert into "Account" values ('1', 'canary', 'canary', 'canary', '{canary}', 'canary', '{canary}', '',
          '5', '{"mail": [{"smtpPass": "canary"}], "token_count": "5"}',
          '{"hooks": {"accessTokens": ["", "canary"]}}', '{"user": "canary"}',
          '{"password": "", "apiKey": null, "pattern": "x", "bearer": {"type": "x"}, "totp": 5}',
          '{"passwordHash": "x"}');
        insert into "Account" values
          ('2', null, null, null, '{}', null, '{}', null, null, '{}', 'null', '{}', '[]', '""');
        insert into "Account" (id) values ('3')""")
    found = {one["column_name"]: one for one in columns.json("columns", "find", code=5)}
    sounding = (
        "accessToken",
        "webhook secret",
        "smtp-pass",
        "apiKeys",
        "totpSecret",
        "private_key",
        "credentials",
    )
    assert {name: one["finding"] for name, one in found.items()} == {
        **dict.fromkeys(sounding, "sounds like a secret, and is not encrypted"),
        **dict.fromkeys(("settings", "raw"), "has JSON keys that sound like secrets, and are not encrypted"),
    }
    assert all(one["rows"] == 1 for one in found.values())
    # What cannot be protected as it is, is not advised to be.
    for name, one in found.items():
        assert ("columns protect" in one["advice"]) is (name in ("accessToken", "webhook secret")), name
    columns("columns", "find", code=5)
    assert "canary" not in columns.out + columns.err
    # Envelopes under such a key are another finding.
    ready.execute("""truncate "Account"; insert into "Account" (id, settings)
      select '1', jsonb_build_object('apiKey', rekey.encrypt_text('v'))""")
    [one] = columns.json("columns", "find", code=5)
    assert one["finding"] == "holds envelopes within other values"


def test_find_tells_what_another_tool_encrypted(columns: Cli, ready: Connection) -> None:
    ready.execute("create table old (id int primary key, data text, raw bytea, doc json, access_token text)")
    token = Fernet(Fernet.generate_key()).encrypt(b"canary").decode()
    ready.execute(
        "insert into old select g, %s, pgp_sym_encrypt('canary', 'p'), to_json(%s::text),"
        " case g when 3 then 'plain' else %s end from generate_series(1, 3) g",
        [token, token, token],
    )
    found = {
        (one["column_name"], one["finding"]): one["rows"] for one in columns.json("columns", "find", code=5)
    }
    other = "holds values that another tool encrypted"
    assert found == {
        ("data", other): 3,
        ("raw", other): 3,
        ("doc", other): 3,
        ("access_token", other): 2,
        ("access_token", "sounds like a secret, and is not encrypted"): 1,
    }
    columns("columns", "protect", "old", "data")
    finding = {one["column_name"]: one["finding"] for one in columns.json("columns", "find", code=5)}
    assert finding["data"] == "is protected, and holds values that are not encrypted"


def test_find_says_that_it_never_reads_foreign_tables_and_large_objects(
    columns: Cli, ready: Connection
) -> None:
    ready.execute("create foreign data wrapper nowhere; create server far foreign data wrapper nowhere")
    ready.execute("create foreign table public.abroad (password text) server far")
    ready.execute("select lo_from_bytea(0, 'x')")
    assert "nothing was forgotten" not in columns("columns", "find")
    assert "foreign table public.abroad, 1 large objects" in columns.err
