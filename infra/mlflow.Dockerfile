# The MLflow server: the version of the lock and a PostgreSQL driver and what its logins need, without torch.
FROM python:3.11.13-slim-bookworm

RUN useradd --uid 10002 --create-home mlflow \
    && mkdir -p /data/mlartifacts /data/mlauth \
    && chown -R mlflow:mlflow /data

COPY requirements.lock /tmp/requirements.lock
RUN pip install --no-cache-dir --constraint /tmp/requirements.lock "mlflow[auth]" "psycopg[binary]" \
    && rm /tmp/requirements.lock

USER mlflow
WORKDIR /data
ENV PYTHONUNBUFFERED=1 \
    DO_NOT_TRACK=true \
    MLFLOW_DISABLE_TELEMETRY=true \
    MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
EXPOSE 5000
