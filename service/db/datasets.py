"""Uploaded data sets. A row is written only once its file is complete."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from erpo_core.errors import NotFoundError
from service.db.ids import new_id
from service.db.models import Dataset
from service.db.paging import Page, read_page


def create_dataset(s: Session, *, name: str, owner: str | None, sha256: str, size_bytes: int, num_rows: int) -> Dataset:
    """A new data set; its id names its file."""
    row = Dataset(
        id=new_id("ds"), name=name[:200], owner=owner, sha256=sha256, size_bytes=size_bytes, num_rows=num_rows
    )
    s.add(row)
    return row


def get_dataset(s: Session, dataset_id: str) -> Dataset:
    """Raises NotFoundError for an id that names nothing."""
    row = s.get(Dataset, dataset_id)
    if row is None:
        raise NotFoundError(f"there is no data set {dataset_id}")
    return row


def list_datasets(s: Session, *, owner: str | None = None, cursor: str | None = None, limit: int = 50) -> Page:
    """Data sets, newest first; only those of ``owner``, if given."""
    query = select(Dataset)
    if owner is not None:
        query = query.where(Dataset.owner == owner)
    return read_page(s, query, Dataset.id, cursor=cursor, limit=limit)
