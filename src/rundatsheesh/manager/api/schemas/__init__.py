"""Shapes of the wire, one file per resource. They feed validation, OpenAPI and the docs."""
