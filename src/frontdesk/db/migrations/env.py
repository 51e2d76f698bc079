"""Alembic's entry: `frontdesk.db.migrate` hands it the connection."""

from alembic import context

from frontdesk.db.session import MARKER

context.configure(connection=context.config.attributes["connection"], version_table=MARKER)
context.run_migrations()
