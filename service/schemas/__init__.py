"""What the API answers, as pydantic models: they document `/openapi.json`; :mod:`service.shape` fills them."""
