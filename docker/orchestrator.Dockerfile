# The command pg-rekey with its HTTP API. The context is the repository:
#   docker build -f docker/orchestrator.Dockerfile -t pg-rekey .
FROM python:3.13-slim-trixie AS build
WORKDIR /src
COPY requirements requirements
RUN pip install --quiet --no-cache-dir --require-hashes --requirement requirements/build.txt \
 && python -m venv --without-pip /opt/pg-rekey \
 && pip --python /opt/pg-rekey/bin/python install --quiet --no-cache-dir --require-hashes --requirement requirements/api.txt
COPY pyproject.toml README.md LICENSE ./
COPY sql sql
COPY orchestrator orchestrator
RUN pip wheel --quiet --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels . \
 && pip --python /opt/pg-rekey/bin/python install --quiet --no-cache-dir --no-deps /wheels/*.whl

FROM python:3.13-slim-trixie
COPY --from=build /opt/pg-rekey /opt/pg-rekey
COPY docker/init.py /opt/pg-rekey/init.py
ENV PATH=/opt/pg-rekey/bin:$PATH
# A number, so that Kubernetes can see that it is not root.
USER 10001:10001
ENTRYPOINT ["pg-rekey"]
