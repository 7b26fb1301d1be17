"""Alembic's entry: `alembic upgrade head`, `alembic upgrade head --sql` and `pgshelf migrate` all pass through here."""

import os

from alembic import context

from pgshelf import migrate

if context.is_offline_mode():
    migrate.run_offline(context, os.environ)
else:
    migrate.run_online(context, os.environ)
