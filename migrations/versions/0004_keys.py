"""Keys of the API: who may call, and which libraries they see.

Revision ID: 0004
Revises: 0003
"""

from pgshelf.migrate import clear_routines, run

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

KEYS = """
create table pgshelf.keys (
  id uuid not null default gen_random_uuid(),
  name text not null,
  role text not null,
  libraries text[],
  created_at timestamptz not null default now(),
  expires_at timestamptz,
  revoked_at timestamptz,
  last_used_at timestamptz,
  constraint keys_pkey primary key (id),
  constraint keys_role_check check (role in ('reader', 'writer', 'admin'))
);
create unique index keys_name_key on pgshelf.keys (name) where revoked_at is null;
create index keys_order_idx on pgshelf.keys (created_at, id);
comment on table pgshelf.keys is 'Who may call the REST API, with which role, for which libraries; revoked ones stay.';
comment on column pgshelf.keys.libraries is 'Ids, names and patterns (team-*) of the libraries it sees; null: all.';
comment on column pgshelf.keys.last_used_at is 'Exact to a minute.';

create table pgshelf.key_secrets (
  hash bytea not null,
  key_id uuid not null,
  hint text not null,
  token boolean not null default false,
  role text,
  libraries text[],
  created_at timestamptz not null default now(),
  expires_at timestamptz,
  constraint key_secrets_pkey primary key (hash),
  constraint key_secrets_key_fk foreign key (key_id) references pgshelf.keys (id) on delete cascade,
  constraint key_secrets_role_check check (role in ('reader', 'writer', 'admin'))
);
create index key_secrets_key_idx on pgshelf.key_secrets (key_id);
create index key_secrets_tokens_idx on pgshelf.key_secrets (expires_at) where token;
comment on table pgshelf.key_secrets is 'What proves a key: its secret, those before it while they overlap, tokens.';
comment on column pgshelf.key_secrets.hash is 'SHA-256 of the secret, which is stored nowhere.';
comment on column pgshelf.key_secrets.hint is 'How the secret begins, for people who look for it.';
comment on column pgshelf.key_secrets.role is 'Of a token: a role below that of its key.';
comment on column pgshelf.key_secrets.libraries is 'Of a token: what it sees of what its key sees; null: all of that.';
"""

DOWN_KEYS = """
drop table pgshelf.key_secrets;
drop table pgshelf.keys;
"""


def upgrade() -> None:
    run(KEYS)


def downgrade() -> None:
    clear_routines()
    run(DOWN_KEYS)
