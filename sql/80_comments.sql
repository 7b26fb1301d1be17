-- What an analyst reads in psql (\d+, \df+).

comment on view pgshelf.libraries_overview is 'The libraries that you were granted, with their numbers: documents, chunks, pending and failed embeddings, bytes.';
comment on view pgshelf.documents_view is 'The documents that you may read, with the name of their library; join your tables to their ids.';
comment on column pgshelf.documents_view.version is 'Grows with every change of the document or its chunks.';
comment on view pgshelf.chunks_view is 'The chunks that you may read, with the name of their library and the key of their document. To search, call pgshelf.search.';
comment on column pgshelf.chunks_view.status is 'ready; pending: waits for its vector; failed: given up, see pending_embeddings.error.';
comment on view pgshelf.pending_embeddings is 'Chunks that wait for a vector, how often it was tried and why it failed.';

comment on function pgshelf.search is
  'The nearest chunks of a library to a vector, best first: select * from pgshelf.search(''handbook'', :embedding, k => 10, filter => ''{"year": {"$gte": 2020}}''). '
  'The library is a name or an id; include names what to return: text, metadata, document, embedding.';
comment on function pgshelf.search_text is
  'The chunks of a library that hold words of a query, best first by BM25: select * from pgshelf.search_text(''handbook'', ''vacuum "dead rows" -index''). '
  'Words are ORed; a "phrase" must be there, -word must not, prefix* stands for all words that begin so. include may name highlight.';
comment on function pgshelf.search_hybrid is
  'Both at once: chunks near to a vector and chunks that hold the words, fused by their ranks (rrf) or by their scores (weighted).';
comment on function pgshelf.explain_search is
  'Runs a search and tells its strategy, statement, plan, rows_removed by the filter, and recall: the share of the true nearest k that it finds.';
comment on function pgshelf.total_hits is
  'How many chunks match a filter and have a vector or, given a query, hold its words.';
comment on function pgshelf.put_document(text, text, text, text[], jsonb, @vector@.vector[], jsonb[], text) is
  'Inserts or replaces the document of a key in the caller''s transaction; the worker embeds chunks that bring no vector. Returns its id.';
comment on function pgshelf.delete_document(text, text, bigint) is
  'Deletes a document, named by its key or its id, with its chunks; a given version must be the current one.';
comment on function pgshelf.library_stats(uuid) is
  'Numbers of the library of an id; libraries_overview shows them for all. Bytes are those of its rows, without indexes.';

comment on view pgshelf.index_status is 'The index of every library: wanted, actual (what searches use), state, progress from 0 to 1 and phase while it is built.';
comment on column pgshelf.index_status.rows is 'About how many chunks its own shelf has; null on shelf 0, see libraries_overview.';
comment on column pgshelf.index_status.valid is 'Whether PostgreSQL uses the index; null where there is none. What is not valid is built again by itself.';
comment on function pgshelf.library_index(uuid) is 'The index of the library of an id; index_status shows them for all.';
comment on function pgshelf.index_recall(text, int, int) is
  'Measures how well the index of a library finds, against exact search for vectors of its own: select * from pgshelf.index_recall(''handbook''). '
  'found_self below 1 after many updates: reindex index concurrently pgshelf.chunks_s..._v...; see index_status.';

comment on view pgshelf.embedder_status is
  'The embedder of every library: the one that is used, the one that is wanted (null where none else is), state, progress from 0 to 1.';
comment on column pgshelf.embedder_status.embedded is 'Chunks whose text has a vector of the wanted embedder, about.';
comment on function pgshelf.library_embedder(uuid) is 'The embedder of the library of an id; embedder_status shows them for all.';

comment on function pgshelf.facets is
  'How many documents have which value, most frequent first: select * from pgshelf.facets(''handbook'', ''{year,lang}'', ''{"$title": {"$ilike": "vac%"}}''). '
  'Attributes are fields of the documents'' metadata or columns such as $source; the elements of an array count one by one.';
comment on function pgshelf.changes is
  'What changed in a library, in the order of commits, from behind a position: select * from pgshelf.changes(''handbook'', after => 17). '
  'Keep the last position and ask again from there. kind is put, delete, embedded or library; positions are given by a running service.';
comment on function pgshelf.count_documents is 'How many documents of a library match a filter.';
comment on function pgshelf.update_documents is
  'Changes the metadata of all documents that match a filter by a merge patch (RFC 7396) and returns how many; dry_run only counts. '
  'When more than max_affected match, nothing is changed and an error (PS021) is raised.';
comment on function pgshelf.delete_documents is
  'Deletes all documents that match a filter, with their chunks, and returns how many; dry_run and max_affected as in update_documents.';

comment on column pgshelf.pending_embeddings.attempts is 'How often it failed while its provider served others; an outage does not count.';
comment on column pgshelf.pending_embeddings.failed is 'Given up, with the reason in error; pgshelf.retry_embeddings tries it again.';
comment on function pgshelf.retry_embeddings is
  'Lets the worker try again what was given up, and returns how many chunks: select pgshelf.retry_embeddings(''handbook'', ''{"year": 2025}''). '
  'Without a filter those of all documents.';

comment on function pgshelf.granted(uuid, text) is
  'Whether you have a library, by its id: ''monitor'' (its numbers), ''read'' or ''write''; null stands for all libraries.';
comment on function pgshelf.granted_libraries(text) is 'The ids of the libraries that were granted to you one by one.';
comment on function pgshelf.grant_library(text, text, text) is
  'Lets a role read or write libraries, or see their numbers: select pgshelf.grant_library(''analyst'', ''handbook'', ''read''). '
  'The library is a name, an id, a pattern (team-*: those that are there now) or * (all, those to come included).';
comment on function pgshelf.revoke_library(text, text) is
  'Takes back what grant_library gave: select pgshelf.revoke_library(''analyst'', ''handbook''); with * everything.';
comment on view pgshelf.audit_view is 'The audit log: who did what to which library, and which attempts were refused.';
comment on view pgshelf.replication_status is
  'This server (the first row) and those that follow it: how far they are, and health: healthy, lagging, disconnected. The limits are '
  'those of pgshelf.replication(max_bytes, max_seconds). Grant pg_monitor to whoever shall see all of it.';
comment on column pgshelf.replication_status.role is 'primary or standby: this server; replica: follows it; subscriber: reads a logical slot.';
comment on column pgshelf.replication_status.lag_seconds is 'How old the last moment is of which everything is known to be there.';
comment on column pgshelf.replication_status.last_message_at is 'A replica''s last reply, by its clock; a standby''s last message from its primary.';
comment on column pgshelf.replication_status.retained_bytes is 'WAL that its slot keeps on this server.';
comment on column pgshelf.replication_status.conflicts is 'Of a standby: queries in this database that replay cancelled, by what they met.';
comment on column pgshelf.replication_status.visible is 'False where PostgreSQL hides the positions from this role, which lacks pg_monitor.';
comment on function pgshelf.beats is 'The heartbeats that replication_status computes with: times, and places in the WAL as numbers of bytes.';
comment on function pgshelf.replication is 'What replication_status shows, with limits of your own for health; 0: none.';
