-- The public SQL interface, as grants. Nothing else of the schema is for others; shelves are granted to nobody.

revoke all on all routines in schema pgshelf from public;

do $$
begin
  -- a role that could not be created is reported by pgshelf migrate; the rest of the upgrade does not wait for it
  if to_regrole('pgshelf_reader') is not null then
    grant usage on schema pgshelf to pgshelf_reader;
    grant select on pgshelf.libraries_overview, pgshelf.documents_view, pgshelf.chunks_view, pgshelf.pending_embeddings, pgshelf.index_status to pgshelf_reader;
    grant select on pgshelf.embedder_status to pgshelf_reader;
    grant execute on function pgshelf.library_embedder to pgshelf_reader;
    grant execute on function pgshelf.search, pgshelf.search_text, pgshelf.search_hybrid, pgshelf.explain_search, pgshelf.total_hits, pgshelf.library_stats to pgshelf_reader;
    grant execute on function pgshelf.library_index, pgshelf.index_recall to pgshelf_reader;
    grant execute on function pgshelf.facets, pgshelf.count_documents, pgshelf.changes to pgshelf_reader;
    -- a business table may hold a foreign key to a document
    grant references (id) on pgshelf.documents to pgshelf_reader;
  end if;
  if to_regrole('pgshelf_writer') is not null then
    grant usage on schema pgshelf to pgshelf_writer;
    grant select on pgshelf.libraries_overview, pgshelf.documents_view, pgshelf.chunks_view, pgshelf.pending_embeddings, pgshelf.index_status to pgshelf_writer;
    grant select on pgshelf.embedder_status to pgshelf_writer;
    grant execute on function pgshelf.library_embedder to pgshelf_writer;
    grant execute on function
      pgshelf.search, pgshelf.search_text, pgshelf.search_hybrid, pgshelf.explain_search, pgshelf.total_hits, pgshelf.library_stats,
      pgshelf.put_document(text, text, text, text[], jsonb, @vector@.vector[], jsonb[], text),
      pgshelf.delete_document(text, text, bigint) to pgshelf_writer;
    grant execute on function pgshelf.library_index, pgshelf.index_recall to pgshelf_writer;
    grant execute on function pgshelf.facets, pgshelf.count_documents, pgshelf.changes, pgshelf.update_documents, pgshelf.delete_documents to pgshelf_writer;
    grant execute on function pgshelf.retry_embeddings to pgshelf_writer;
    grant references (id) on pgshelf.documents to pgshelf_writer;
  end if;
end $$;
