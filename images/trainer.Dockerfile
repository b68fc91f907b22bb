# The trainer, for GPUs and for CPUs with native torch and gloo: torch holds both. Not root. Build from the root:
#   docker build -f images/trainer.Dockerfile -t finetune-trainer .
ARG PYTHON_IMAGE=python:3.12-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
WORKDIR /src
COPY requirements/bootstrap.txt requirements/trainer.txt requirements/
RUN python -m venv /build \
 && /build/bin/pip install --no-cache-dir --require-hashes -r requirements/bootstrap.txt \
 && python -m venv --without-pip /app \
 && /build/bin/uv pip install --no-cache --python /app/bin/python --compile-bytecode --require-hashes \
        -r requirements/trainer.txt
COPY pyproject.toml README.md LICENSE ./
COPY operator operator
COPY trainer trainer
RUN /build/bin/uv build --wheel --no-build-isolation --python /build/bin/python --out-dir /wheel . \
 && /build/bin/uv pip install --no-cache --python /app/bin/python --compile-bytecode --no-deps /wheel/*.whl

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="finetune-trainer" \
      org.opencontainers.image.description="Trains FineTuneJobs" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /app /app
ENV PATH=/app/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# The user that the operator's pods run as.
USER 1000:1000
ENTRYPOINT ["finetune-supervisor"]
