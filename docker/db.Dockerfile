# PostgreSQL with pg_cron and the extension pg_rekey. The context is the repository:
#   docker build -f docker/db.Dockerfile -t pg-rekey-db .
ARG POSTGRES=17
FROM postgres:$POSTGRES-trixie AS extension
RUN apt-get update \
 && apt-get install -y --no-install-recommends postgresql-$PG_MAJOR-cron \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/*
COPY sql/pg_rekey.control sql/dist/pg_rekey--*.sql /usr/share/postgresql/$PG_MAJOR/extension/

# What the test suite wants, too; no database is made in it but the server's own.
FROM extension AS test
RUN apt-get update \
 && apt-get install -y --no-install-recommends \
      postgresql-$PG_MAJOR-pgaudit postgresql-$PG_MAJOR-pgtap postgresql-$PG_MAJOR-plpgsql-check \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/*

# The last stage is what is built by default.
FROM extension AS db
COPY docker/db-init.sh /docker-entrypoint-initdb.d/50-pg_rekey.sh
ENV POSTGRES_DB=app
CMD ["postgres", "-c", "shared_preload_libraries=pg_cron", "-c", "cron.database_name=app"]
