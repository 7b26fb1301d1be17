FROM python:3.13-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY sdk ./sdk
COPY service ./service
COPY migrations ./migrations
COPY sql ./sql
COPY docs/errors.md ./docs/errors.md
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels ./sdk . \
    && python -m venv /opt/pgshelf \
    && /opt/pgshelf/bin/pip install --no-cache-dir /wheels/*.whl

FROM python:3.13-slim
# The directory is for the embedded PostgreSQL, which starts only where PGSHELF_DATABASE_URL is missing.
RUN useradd --system --uid 10001 --home-dir /var/lib/pgshelf --create-home --shell /usr/sbin/nologin pgshelf
COPY --from=build /opt/pgshelf /opt/pgshelf
ENV PATH=/opt/pgshelf/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PGSHELF_DATA_DIR=/var/lib/pgshelf/data
USER pgshelf
WORKDIR /var/lib/pgshelf
EXPOSE 8432
# The slim image has no curl.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8432/health', timeout=4)"]
# Refuses to start until there is a key, PGSHELF_AUTH=on or JWT, or PGSHELF_ALLOW_UNAUTHENTICATED=true says that others
# cannot reach the published port.
CMD ["pgshelf", "serve", "--host", "0.0.0.0", "--port", "8432"]
