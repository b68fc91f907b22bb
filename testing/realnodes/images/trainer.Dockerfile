# The trainer of the tests: its own modules as in images/trainer-cpu.Dockerfile. torch is mounted from the environment of
# the tests, because packing its six gigabytes for each node would take longer than all tests together.
ARG PYTHON_IMAGE
FROM ${PYTHON_IMAGE} AS dependencies
WORKDIR /src
ARG SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
COPY requirements/bootstrap.txt requirements/
RUN python -m venv /build \
 && /build/bin/pip install --no-cache-dir --require-hashes -r requirements/bootstrap.txt \
 && python -m venv --without-pip /app

FROM dependencies AS own
COPY pyproject.toml README.md LICENSE ./
COPY operator operator
COPY trainer trainer
RUN /build/bin/uv build --wheel --no-build-isolation --python /build/bin/python --out-dir /wheel . \
 && /build/bin/uv pip install --no-cache --python /app/bin/python --prefix /own --compile-bytecode --no-deps \
        /wheel/*.whl \
 && rm -rf /own/.lock /own/bin/finetune /own/bin/finetune-operator /own/lib/python3*/site-packages/finetune_operator

FROM ${PYTHON_IMAGE}
COPY --from=dependencies /app /app
COPY --from=own /own /app
ENV PATH=/app/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
USER 1000:1000
WORKDIR /tmp
ENTRYPOINT ["finetune-supervisor"]
