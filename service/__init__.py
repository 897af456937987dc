"""The HTTP service: API, database, pages, CLI and client. Nothing here imports torch or the workers."""
