# The operator: Python and what it imports, nothing else. No shell, no torch, non-root, under 150 MiB.
#   make image-operator        or: docker build -f images/operator.Dockerfile -t finetune-operator .
ARG PYTHON_IMAGE=python:3.12.12-slim-bookworm@sha256:593bd06efe90efa80dc4eee3948be7c0fde4134606dd40d8dd8dbcade98e669c

FROM ${PYTHON_IMAGE} AS dependencies
WORKDIR /src
# Some builders have their own certificate authorities.
ARG SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
COPY requirements/bootstrap.txt requirements/operator.txt requirements/
RUN python -m venv /build \
 && /build/bin/pip install --no-cache-dir --require-hashes -r requirements/bootstrap.txt \
 && python -m venv --without-pip /app \
 && /build/bin/uv pip install --no-cache --python /app/bin/python --compile-bytecode --require-hashes \
        -r requirements/operator.txt

FROM dependencies AS build
COPY pyproject.toml README.md LICENSE ./
COPY operator operator
COPY trainer trainer
# One distribution contains both sides; the operator imports only the contract of the trainer side.
RUN /build/bin/uv build --wheel --no-build-isolation --python /build/bin/python --out-dir /wheel . \
 && /build/bin/uv pip install --no-cache --python /app/bin/python --compile-bytecode --no-deps /wheel/*.whl \
 && rm -rf /app/lib/python3*/site-packages/finetune_trainer
COPY images/assemble.py images/sbom.py images/
RUN python images/assemble.py /app /rootfs

FROM scratch
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="finetune-operator" \
      org.opencontainers.image.description="Reconciles FineTuneJobs" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="https://github.com/finetune-operator/finetune-operator" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /rootfs /
ENV PATH=/app/bin:/usr/local/bin:/usr/bin PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
WORKDIR /tmp
ENTRYPOINT ["finetune-operator"]
CMD ["run"]
