"""What routes are given: the database, the caller, and the application's parts. Nothing is global."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from service.db.engine import Database
from service.events import EventHub
from service.publish import Publisher
from service.settings import Settings


@dataclass(frozen=True)
class Parts:
    """What ``create_app`` wires, once per application."""

    settings: Settings
    database: Database
    publisher: Publisher
    events: EventHub


def parts_of(request: Request) -> Parts:
    """The application's parts."""
    return request.app.state.parts


def _database(request: Request) -> Database:
    return parts_of(request).database


def _settings(request: Request) -> Settings:
    return parts_of(request).settings


def _events(request: Request) -> EventHub:
    return parts_of(request).events


def _publisher(request: Request) -> Publisher:
    return parts_of(request).publisher


Db = Annotated[Database, Depends(_database)]
AppSettings = Annotated[Settings, Depends(_settings)]
Events = Annotated[EventHub, Depends(_events)]
Bell = Annotated[Publisher, Depends(_publisher)]
