"""Run by Alembic; the connection is handed over by :func:`privtrain.registry.database.upgrade`."""

from alembic import context

from privtrain.registry.tables import Base

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=Base.metadata, transactional_ddl=True)
context.run_migrations()
