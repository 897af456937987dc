"""A typed client of the HTTP API: needs httpx, never torch.

    client = ErpoClient("http://127.0.0.1:8000")
    job = client.train(model="smollm2-135m", dataset="reasoning-gym:chain_sum", max_steps=12)
    job.wait(on_event=print)
    client.runs.metrics(job.run_id, names=["reward"])

:class:`AsyncErpoClient` has the same methods as coroutines.
"""

from service.client.async_client import AsyncErpoClient, AsyncJobHandle
from service.client.errors import ErpoApiError, JobFailed
from service.client.sync_client import ErpoClient, JobHandle

__all__ = ["AsyncErpoClient", "AsyncJobHandle", "ErpoApiError", "ErpoClient", "JobFailed", "JobHandle"]
