"""The application: the only place that wires."""

import contextlib
import logging
from collections.abc import AsyncIterator

from fastapi import FastAPI

from service.db.engine import Database
from service.deps import Parts
from service.errors import install_handlers
from service.events import EventHub
from service.guard import GuardMiddleware
from service.openapi import add_docs, install_openapi
from service.publish import Publisher
from service.routers import (
    analyze,
    comparisons,
    evaluations,
    exports,
    health,
    jobs,
    registries,
    runs,
    session,
    traces,
)
from service.routers.dashboard import add_dashboard
from service.settings import Settings

log = logging.getLogger(__name__)


def create_app(settings: Settings | None = None) -> FastAPI:
    """The API and the pages. Importing and building it loads no machine-learning library."""
    settings = settings or Settings()
    is_embedded = settings.database_url.startswith("sqlite")
    if is_embedded:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
    database = Database(settings.database_url)
    parts = Parts(settings, database, Publisher(settings.broker_url, settings.queues[0]), EventHub(database))

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if is_embedded:
            database.migrate()
        await parts.events.start()
        try:
            yield
        finally:
            await parts.events.stop()
            parts.publisher.close()
            database.dispose()

    app = FastAPI(title="ERPO Lab", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.parts = parts
    install_handlers(app)
    app.add_middleware(GuardMiddleware, settings=settings)
    # Pages share addresses with documents and match browsers only, so they come first.
    add_dashboard(app)
    add_docs(app)
    # Literal paths come before those with an id.
    for router in (
        health.router,
        session.router,
        jobs.router,
        analyze.router,
        traces.analyses,
        exports.router,
        traces.training,
        comparisons.router,
        evaluations.router,
        runs.router,
        registries.router,
    ):
        app.include_router(router)
    install_openapi(app)
    return app
