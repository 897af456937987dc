"""The process that computes one attempt of one job. It knows ``erpo_core`` and a socket: no database, no Celery."""
