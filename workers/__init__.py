"""Celery workers: they claim jobs in the database and supervise the children that compute."""
