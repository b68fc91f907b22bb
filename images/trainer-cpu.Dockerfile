# The trainer for CPU nodes: native torch over gloo. Not root.
#   make image-trainer-cpu        or: docker build -f images/trainer-cpu.Dockerfile -t finetune-trainer-cpu .
ARG PYTHON_IMAGE=python:3.12.12-slim-bookworm@sha256:593bd06efe90efa80dc4eee3948be7c0fde4134606dd40d8dd8dbcade98e669c

FROM ${PYTHON_IMAGE} AS dependencies
WORKDIR /src
# Some builders come with authorities of their own.
ARG SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
# Address of an index with torch built for CPUs alone; empty: torch as it is locked, which trains the same on CPUs and
# takes 4 GB more.
ARG TORCH_CPU_INDEX=
COPY requirements/bootstrap.txt requirements/trainer.txt requirements/
COPY images/without_cuda.py images/
RUN python -m venv /build \
 && /build/bin/pip install --no-cache-dir --require-hashes -r requirements/bootstrap.txt \
 && python -m venv --without-pip /app \
 && python images/without_cuda.py "$TORCH_CPU_INDEX" < requirements/trainer.txt > /tmp/lock.txt \
 && if [ -n "$TORCH_CPU_INDEX" ]; then \
        version=$(sed -n 's/^torch==\([^ ;]*\).*/\1/p' requirements/trainer.txt) \
        && /build/bin/uv pip install --no-cache --python /app/bin/python --no-deps \
               --index-url "$TORCH_CPU_INDEX" "torch==$version+cpu"; \
    fi \
 && /build/bin/uv pip install --no-cache --python /app/bin/python --compile-bytecode --require-hashes --no-deps \
        -r /tmp/lock.txt

FROM dependencies AS own
COPY pyproject.toml README.md LICENSE ./
COPY operator operator
COPY trainer trainer
COPY images/sbom.py images/
# One distribution holds both sides; of the operator's, the trainer imports nothing.
RUN /build/bin/uv build --wheel --no-build-isolation --python /build/bin/python --out-dir /wheel . \
 && /build/bin/uv pip install --no-cache --python /app/bin/python --prefix /own --compile-bytecode --no-deps \
        /wheel/*.whl \
 && rm -rf /own/.lock /own/bin/finetune /own/bin/finetune-operator /own/lib/python3*/site-packages/finetune_operator \
 && set -- /app/lib/python3*/site-packages /own/lib/python3*/site-packages \
 && python images/sbom.py /own/share/sbom/finetune-trainer-cpu.spdx.json finetune-trainer-cpu "$1:$2"

FROM ${PYTHON_IMAGE}
# Gigabytes that change with the locks alone, then what changes with every release.
COPY --from=dependencies /app /app
COPY --from=own /own /app
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="finetune-trainer-cpu" \
      org.opencontainers.image.description="Trains FineTuneJobs on CPU nodes with native torch and gloo" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="https://github.com/finetune-operator/finetune-operator" \
      org.opencontainers.image.licenses="Apache-2.0"
# All that is written goes to volumes: the root file system is read-only in the pods.
ENV PATH=/app/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
# The user that the operator's pods run as.
USER 1000:1000
WORKDIR /tmp
ENTRYPOINT ["finetune-supervisor"]
