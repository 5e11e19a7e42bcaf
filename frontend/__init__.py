"""The HTTP stage: schemas, routes, streaming, admission and the request table."""
