-- What an analyst reads in psql (\d+, \df+).

comment on view pgshelf.libraries_overview is 'Every library with its numbers: documents, chunks, pending and failed embeddings, bytes.';
comment on view pgshelf.documents_view is 'Every document with the name of its library; join your tables to its id.';
comment on column pgshelf.documents_view.version is 'Grows with every change of the document or its chunks.';
comment on view pgshelf.chunks_view is 'Every chunk with the name of its library and the key of its document. To search, call pgshelf.search.';
comment on column pgshelf.chunks_view.status is 'ready; pending: waits for its vector; failed: given up, see pending_embeddings.error.';
comment on view pgshelf.pending_embeddings is 'Chunks that wait for a vector, how often it was tried and why it failed.';

comment on function pgshelf.search(text, @vector@.vector, int, int, float8, float8, text[]) is
  'The nearest chunks of a library to a vector, best first: select * from pgshelf.search(''handbook'', :embedding, k => 10). '
  'The library is a name or an id; include names what to return: text, metadata, document, embedding.';
comment on function pgshelf.put_document(text, text, text, text[], jsonb, @vector@.vector[], jsonb[], text) is
  'Inserts or replaces the document of a key in the caller''s transaction; the worker embeds chunks that bring no vector. Returns its id.';
comment on function pgshelf.delete_document(text, text, bigint) is
  'Deletes a document, named by its key or its id, with its chunks; a given version must be the current one.';
comment on function pgshelf.library_stats(uuid) is
  'Numbers of the library of an id; libraries_overview shows them for all. Bytes are those of its rows, without indexes.';
