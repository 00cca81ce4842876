"""Alembic's migrations; run in-process by `store/database.py`."""
