"""Alembic's entry: `alembic upgrade head`, `alembic upgrade head --sql` and `pgshelf migrate` all pass through here."""

import os

from alembic import context

from pgshelf import migrate

migrate.run_environment(context, os.environ)
