# The image of export pods: the CPU trainer with the packages of the extra `export` (OpenVINO, optimum-intel). Non-root.
#   make image-trainer-export        or: docker build -f images/trainer-export.Dockerfile -t finetune-trainer-export .
ARG PYTHON_IMAGE=python:3.12.12-slim-bookworm@sha256:593bd06efe90efa80dc4eee3948be7c0fde4134606dd40d8dd8dbcade98e669c

FROM ${PYTHON_IMAGE} AS base
# training.compile builds its kernels when a job starts.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt /var/log/apt /var/log/dpkg.log
# The image of Python has no bytecode, and a pod with a read-only root file system cannot keep what it compiles.
RUN python -m compileall -q -x '/(test|tests|idlelib|lib2to3|tkinter|turtledemo|ensurepip)/' \
        "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"

FROM base AS dependencies
WORKDIR /src
# Some builders have their own certificate authorities.
ARG SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
# Address of an index with a CPU-only torch. Empty: the locked torch, which trains the same on CPUs and is 4 GB larger.
ARG TORCH_CPU_INDEX=
COPY requirements/bootstrap.txt requirements/export.txt requirements/
COPY images/without_cuda.py images/
RUN python -m venv /build \
 && /build/bin/pip install --no-cache-dir --require-hashes -r requirements/bootstrap.txt \
 && python -m venv --without-pip /app \
 && python images/without_cuda.py "$TORCH_CPU_INDEX" < requirements/export.txt > /tmp/lock.txt \
 && if [ -n "$TORCH_CPU_INDEX" ]; then \
        version=$(sed -n 's/^torch==\([^ ;]*\).*/\1/p' requirements/export.txt) \
        && /build/bin/uv pip install --no-cache --python /app/bin/python --compile-bytecode --no-deps \
               --index-url "$TORCH_CPU_INDEX" "torch==$version+cpu"; \
    fi \
 && /build/bin/uv pip install --no-cache --python /app/bin/python --compile-bytecode --require-hashes --no-deps \
        -r /tmp/lock.txt

FROM dependencies AS own
COPY pyproject.toml README.md LICENSE ./
COPY operator operator
COPY trainer trainer
COPY images/sbom.py images/check_bytecode.py images/
# One distribution contains both sides; the trainer imports nothing of the operator.
RUN /build/bin/uv build --wheel --no-build-isolation --python /build/bin/python --out-dir /wheel . \
 && /build/bin/uv pip install --no-cache --python /app/bin/python --prefix /own --compile-bytecode --no-deps \
        /wheel/*.whl \
 && rm -rf /own/.lock /own/bin/finetune /own/bin/finetune-operator /own/lib/python3*/site-packages/finetune_operator \
 && set -- /app/lib/python3*/site-packages /own/lib/python3*/site-packages \
 && python images/check_bytecode.py "$1" "$2" "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" \
 && python images/sbom.py /own/share/sbom/finetune-trainer-export.spdx.json finetune-trainer-export "$1:$2"

FROM base
# First the gigabytes that change only with the lock files, then the layer that changes with every release.
COPY --from=dependencies /app /app
COPY --from=own /own /app
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="finetune-trainer-export" \
      org.opencontainers.image.description="Writes outputs of FineTuneJobs that need the packages of the extra export: OpenVINO, optimum-intel and NNCF" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="https://github.com/finetune-operator/finetune-operator" \
      org.opencontainers.image.licenses="Apache-2.0"
# The root file system is read-only in the pods; everything is written to volumes.
ENV PATH=/app/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
# The user of the training pods, which own the checkpoints.
USER 1000:1000
WORKDIR /tmp
ENTRYPOINT ["python", "-m", "finetune_trainer.export_pod"]
