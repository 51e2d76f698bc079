# The service, for a PostgreSQL of your own: set FRONTDESK_DATABASE_URL, and the TLS files, because it listens beyond
# loopback (docs/settings.md).
FROM python:3.12-slim-bookworm AS build
WORKDIR /build
COPY requirements.txt pyproject.toml README.md LICENSE ./
RUN python -m venv /opt/frontdesk \
 && /opt/frontdesk/bin/pip install --no-cache-dir --require-hashes --requirement requirements.txt \
 && python -m pip install --no-cache-dir hatchling==1.33.0
COPY src src
COPY generated generated
RUN python -m pip wheel --no-cache-dir --no-build-isolation --no-deps --wheel-dir /build/wheels . \
 && /opt/frontdesk/bin/pip install --no-cache-dir --no-deps /build/wheels/*.whl

FROM python:3.12-slim-bookworm
# Without a database URL the image runs the embedded PostgreSQL, which needs an account with a name.
RUN useradd --system --uid 10001 --create-home --home-dir /var/lib/frontdesk frontdesk
COPY --from=build /opt/frontdesk /opt/frontdesk
# The health check needs no certificate of its own on this port; open it to the probes of an orchestrator if you like.
ENV PATH=/opt/frontdesk/bin:$PATH PYTHONUNBUFFERED=1 FRONTDESK_DATA_DIR=/var/lib/frontdesk/data \
    FRONTDESK_HEALTH_LISTEN=127.0.0.1:50052
USER frontdesk
VOLUME /var/lib/frontdesk
EXPOSE 50051
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s CMD ["frontdesk", "health"]
ENTRYPOINT ["frontdesk"]
CMD ["serve"]
