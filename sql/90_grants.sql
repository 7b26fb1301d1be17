-- The public SQL interface, as grants. Nothing else of the schema is for others; shelves are granted to nobody. Which libraries
-- somebody sees through it is in the table of grants (14_access.sql).

revoke all on all routines in schema pgshelf from public;

do $$
declare
  -- the numbers of libraries, without what is in them
  v_numbers text[] := array[
    'usage on schema pgshelf',
    'select on pgshelf.libraries_overview, pgshelf.index_status, pgshelf.embedder_status, pgshelf.pending_embeddings',
    'execute on function pgshelf.library_stats, pgshelf.library_index, pgshelf.library_embedder',
    'select on pgshelf.replication_status',
    'execute on function pgshelf.replication, pgshelf.beats',
    'execute on function pgshelf.granted, pgshelf.granted_libraries'];
  v_reading text[] := v_numbers || array[
    'select on pgshelf.documents_view, pgshelf.chunks_view',
    'execute on function pgshelf.search, pgshelf.search_text, pgshelf.search_hybrid, pgshelf.explain_search, pgshelf.total_hits',
    'execute on function pgshelf.facets, pgshelf.count_documents, pgshelf.changes, pgshelf.index_recall'];
  v_writing text[] := v_reading || array[
    'execute on function pgshelf.put_document, pgshelf.delete_document, pgshelf.update_documents, pgshelf.delete_documents',
    'execute on function pgshelf.retry_embeddings'];
  v_monitoring text[] := v_numbers || array['select on pgshelf.audit_view'];
  -- the rest of what the service runs are the functions below
  v_serving text[] := v_writing || v_monitoring || array[
    'select on pgshelf.installation, pgshelf.alembic_version, pgshelf.documents, pgshelf.change_log, pgshelf.waiting, pgshelf.embedder_changes',
    'select on pgshelf.keys, pgshelf.key_secrets, pgshelf.audit_log',
    'select on pgshelf.libraries',
    -- what clients say of a library, and nothing that pgshelf makes of it
    'insert (name, description, dimension, metric, embedder, chunking, language, metadata, index, index_state, attributes, attributes_ready)
      on pgshelf.libraries',
    'update (name, description, chunking, metadata, version, updated_at) on pgshelf.libraries',
    'select, insert, update on pgshelf.idempotency_keys',
    'execute on function pgshelf.is_id, pgshelf.in_scope, pgshelf.library_in_scope, pgshelf.merge_patch, pgshelf.scoped, pgshelf.shelf_rows'];
  v_working text[] := array['usage on schema pgshelf'];
  v_role text;
  v_grants text[];
  v_grant text;
begin
  for v_role, v_grants in values ('pgshelf_reader', v_reading), ('pgshelf_writer', v_writing), ('pgshelf_monitor', v_monitoring),
    ('pgshelf_service', v_serving), ('pgshelf_worker', v_working) loop
    -- a role that could not be created is reported by pgshelf migrate; the rest of the upgrade does not wait for it
    continue when to_regrole(v_role) is null;
    -- older versions granted these: to check a foreign key PostgreSQL runs what its maker wrote, a cast, as the owner of the referenced table
    execute format('revoke references on pgshelf.documents from %I', v_role);
    execute format('revoke references (id) on pgshelf.documents from %I', v_role);
    execute format('revoke insert, update on pgshelf.libraries from %I', v_role);
    foreach v_grant in array v_grants loop
      execute format('grant %s to %I', v_grant, v_role);
    end loop;
  end loop;
end $$;

-- What the service runs with the rights of the owner, each a whole step of its own, and nobody else may run. The functions that build
-- and move shelves are not among them: PostgreSQL lets the owner alone attach partitions and build indexes, so the worker is the owner.
do $$
declare
  v_name text;
begin
  foreach v_name in array array[
    -- libraries
    'library_named', 'delete_library', 'declare_attributes', 'check_attributes', 'check_index', 'want_index', 'index_in_full', 'index_estimate',
    'count_rows', 'want_embedder', 'cancel_embedder', 'embedded_by', 'embedded_with', 'change_store',
    -- documents and chunks
    'document_named', 'write_document', 'write_documents', 'refused_documents', 'library_config', 'embedded_texts_of', 'pending_chunks',
    'patch_document', 'sorted_documents', 'count_chunks', 'chunk_named', 'document_chunks', 'patch_chunk', 'delete_chunk', 'vector_of',
    'add_event', 'begin_import', 'continue_import', 'end_import', 'open_export', 'read_changes', 'stamp_changes', 'look_for_changes',
    -- the query cache
    'search_state', 'forget_answers',
    -- keys, limits of callers, the audit log
    'create_key', 'key_named', 'revoke_key', 'rotate_key', 'issue_token', 'key_used', 'take_requests', 'audit',
    -- /metrics
    'library_metrics', 'builds_running',
    -- what the worker inside the service does
    'probe_index',
    'claim_pending', 'lease_again', 'store_embeddings', 'fail_embeddings', 'cached_embeddings', 'cache_embeddings', 'evict_embeddings',
    'fill_attributes', 'reap_deleted', 'stamp_all_changes', 'prune_changes', 'forget_imports', 'prune_idempotency_keys', 'prune_audit',
    'forget_rate_shares', 'join_marks', 'beat'] loop
    execute format('alter function pgshelf.%I security definer', v_name);
    if to_regrole('pgshelf_service') is not null then
      execute format('grant execute on function pgshelf.%I to pgshelf_service', v_name);
    end if;
  end loop;
end $$;

-- The service asks for itself who may see what, so it is granted all libraries, and the monitor the numbers of all; once: an operator
-- may grant a part of them instead. Members of the other roles see what was granted to them.
insert into pgshelf.grants (role, access)
  select x.role, x.access from (values ('pgshelf_service', 'write'), ('pgshelf_monitor', 'monitor')) x(role, access)
  where to_regrole(x.role) is not null and not exists (select from pgshelf.grants g where g.role = x.role);
