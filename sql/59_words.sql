-- Word search: BM25 (k1 1.2, b 0.75) over chunks.tsv, in stock PostgreSQL, and what a person may type for it.

-- What is typed, in pieces. "Several words" in quotes are one piece, everything else is split at blanks. A single - in front excludes;
-- a quote opens only where a piece can begin and closes anywhere, so 5" is no quotation, nor is one that never ends.
create or replace function pgshelf.query_parts(p_query text) returns table (part text, kind text, excluded boolean)
  immutable parallel safe language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  -- beyond this nobody types: it bounds what a query can cost
  v_query text := translate(left(p_query, 8192), '“”„', '"""');
  v_quoted constant text := '(?<![^\s(])(-?)"([^"]+)"';
begin
  return query select m.found[2], 'phrase', m.found[1] = '-' from regexp_matches(v_query, v_quoted, 'g') m(found);
  return query
    select rtrim(case when x.word ~ '^-[^-]' then substr(x.word, 2) else x.word end, '*'),
      case when x.word ~ '[^*]\*$' then 'prefix' else 'word' end, x.word ~ '^-[^-]'
    from regexp_split_to_table(regexp_replace(v_query, v_quoted, ' ', 'g'), '\s+') x(word) where x.word <> '';
end $$;

-- The words that are scored, each once, and how often they were typed; words in quotes are among them, excluded ones are not.
-- The last word of a prefix stands for all that begin so, and a stop word is a prefix like any other: the* finds theorem.
create or replace function pgshelf.query_words(p_language text, p_query text)
  returns table (lexeme text, prefix boolean, times int, query tsquery)
  immutable parallel safe language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_config regconfig := ('pg_catalog.' || quote_ident(p_language))::regconfig;
begin
  return query
    select y.lexeme, y.prefix, sum(y.times)::int,
      -- quoted as tsquery reads it, so that nothing in a word is an operator
      ('''' || replace(replace(y.lexeme, '\', '\\'), '''', '''''') || case when y.prefix then ''':*' else '''' end)::tsquery
    from (
      select u.lexeme, cardinality(u.positions) as times,
        x.kind = 'prefix' and u.positions[1] = max(u.positions[1]) over (partition by x.place) as prefix
      from (select p.kind, p.place, case when p.kind = 'prefix' and to_tsvector(v_config, p.part) = '' then to_tsvector('simple', p.part)
              else to_tsvector(v_config, p.part) end as words
            from pgshelf.query_parts(p_query) with ordinality p(part, kind, excluded, place) where not p.excluded) x
      cross join lateral unnest(x.words) u) y
    group by y.lexeme, y.prefix;
end $$;

-- A piece as a tsquery that its words must fulfil side by side; null when nothing of it is ever indexed (stop words).
create or replace function pgshelf.part_query(p_language text, p_part text, p_kind text) returns tsquery
  immutable parallel safe language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  if pgshelf.words(p_language, p_part) <> '' then
    return (phraseto_tsquery(('pg_catalog.' || quote_ident(p_language))::regconfig, p_part)::text
      || case p_kind when 'prefix' then ':*' else '' end)::tsquery;
  elsif p_kind = 'prefix' and pgshelf.words('simple', p_part) <> '' then
    return pgshelf.part_query('simple', p_part, p_kind);
  end if;
  return null;
end $$;

-- How a typed query is read. A chunk is found when it holds any of the scored words and fulfils what is required: the "phrases" and
-- the -exclusions. Null for either means that there is none; without a scored word nothing is found.
create or replace function pgshelf.words_query(p_language text, p_query text, out scored tsquery, out required tsquery)
  immutable parallel safe language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  scored := (select string_agg(w.query::text, ' | ')::tsquery from pgshelf.query_words(p_language, p_query) w);
  if p_query ~ '["“”„-]' then
    required := (select string_agg(case when p.excluded then '!(' else '(' end || q.part || ')', ' & ')::tsquery
      from pgshelf.query_parts(p_query) p cross join lateral pgshelf.part_query(p_language, p.part, p.kind) q(part)
      where (p.excluded or p.kind = 'phrase') and q.part is not null);
  end if;
end $$;

-- The passage of a text that matches a query best, as HTML: &, < and > of the text are escaped, so <mark> and </mark> around the words
-- found are its only tags. Null when no word of the query is in the text. Where a phrase was asked for, the passage is that of the phrase.
create or replace function pgshelf.highlight(p_language text, p_text text, p_scored tsquery, p_required tsquery) returns text
  immutable parallel safe language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_config regconfig := ('pg_catalog.' || quote_ident(p_language))::regconfig;
  v_options constant text := E'StartSel="\x04", StopSel="\x05"';
  v_phrases text := querytree(p_required);
  -- ts_headline drops what looks like a tag or an entity: these characters become controls, which are blanks to it, until it is done
  v_text text := translate(p_text, E'&<>\x01\x02\x03\x04\x05', E'\x01\x02\x03');
  v_passage text;
begin
  if v_phrases not in ('', 'T') then
    v_passage := ts_headline(v_config, v_text, v_phrases::tsquery && p_scored, v_options);
  end if;
  if coalesce(strpos(v_passage, E'\x04'), 0) = 0 then
    v_passage := ts_headline(v_config, v_text, p_scored, v_options);
  end if;
  if coalesce(strpos(v_passage, E'\x04'), 0) = 0 then
    return null;
  end if;
  v_passage := replace(replace(replace(v_passage, E'\x01', '&amp;'), E'\x02', '&lt;'), E'\x03', '&gt;');
  return replace(replace(v_passage, E'\x04', '<mark>'), E'\x05', '</mark>');
end $$;

-- The same for a query as it is typed; who highlights several texts for it reads it once, by words_query.
create or replace function pgshelf.highlight(p_language text, p_text text, p_query text) returns text
  immutable parallel safe language sql set search_path = pg_catalog, pg_temp
  as $$ select pgshelf.highlight(p_language, p_text, q.scored, q.required) from pgshelf.words_query(p_language, p_query) q $$;

-- A filter as a condition on a chunk `c`: one look at its document by key; offset keeps it from becoming a join.
create or replace function pgshelf.word_filter(p_documents text, p_chunks text) returns text
  immutable parallel safe language sql
as $$
  select case when p_documents = 'true' and p_chunks !~ '\md\.' then p_chunks
    else format('exists (select 1 from pgshelf.documents d where d.id = c.document_id and %s and %s offset 0)', p_documents, p_chunks) end
$$;

-- The weight of each scored word: how often it was typed, by its inverse document frequency. p_chunks says in how many chunks word `q` is.
create or replace function pgshelf.word_weights(p_language text, p_chunks text) returns text
  immutable parallel safe language sql
as $$
  select format('select w.*, w.times * ln((greatest(z.chunks, w.chunks) + 1) / (w.chunks + 0.5::float8)) as weight
    from (select q.*, %s as chunks from pgshelf.query_words(%L, $4) q offset 0) w, w_size z where w.chunks > 0 order by w.lexeme collate "C", w.prefix',
    p_chunks, p_language)
$$;

-- The BM25 score of a chunk `v` (words, bytes) by `w_terms` and `w_size`. How often a word stands in it comes out of ts_rank: for one word
-- and weights of 1 that is the sum of 1/j² for j up to the frequency, over pi²/6, and its inverse is exact up to 255. For a prefix ts_rank
-- adds up the words that it stands for, so those are counted.
create or replace function pgshelf.word_score() returns text
  immutable parallel safe language sql
as $$
  select '(select sum(t.weight * f.often * 2.2::float8 / (f.often + 1.2::float8 * (0.25::float8 + 0.75::float8 * v.bytes / z.mean)))
    from w_size z, w_terms t
    cross join lateral (select ts_rank(''{1,1,1,1}'', v.words, t.query)::float8 as rank offset 0) r
    cross join lateral (select case
      when t.prefix then (select sum(cardinality(u.positions))::float8 from unnest(v.words) u where starts_with(u.lexeme, t.lexeme))
      else round(1 / (1.64493406685::float8 * (1 - r.rank)) - 0.5::float8) end as often) f
    where r.rank > 0)'
$$;

-- A shelf read for word candidates: p_from and p_where find the chunks `c`; "tsv || ''" takes the words out of TOAST once for all of them.
create or replace function pgshelf.word_scan(p_from text, p_where text) returns text
  immutable parallel safe language sql
as $$
  select format('select c.id, c.document_id, c.ordinal, %s as score
    from %s cross join lateral (select c.tsv || '''' as words, octet_length(c.text)::float8 as bytes offset 0) v
    where %s order by score desc, c.id limit $3', pgshelf.word_score(), p_from, p_where)
$$;

-- Word candidates on shelf 0, exactly: one pass over the library by the primary key, and the words are counted in what it finds.
create or replace function pgshelf.shared_word_candidates(p_library pgshelf.libraries, p_documents text, p_chunks text) returns text
  stable language sql set search_path = pg_catalog, pg_temp
as $$
  select format($sql$w_typed as materialized (select q.* from pgshelf.words_query(%2$L, $4) q),
    w_size as materialized (select count(*)::float8 as chunks, sum(octet_length(c.text))::float8 / nullif(count(*), 0) as mean
      from pgshelf.chunks_s0 c where c.library_id = %1$L),
    w_hits as materialized (select c.id, c.document_id, c.ordinal, v.words, v.bytes,
        coalesce(v.words @@ (select q.required from w_typed q), true) and %3$s as fits
      from pgshelf.chunks_s0 c
      cross join lateral (select c.tsv || '' as words, octet_length(c.text)::float8 as bytes offset 0) v
      where c.library_id = %1$L and c.tsv @@ (select q.scored from w_typed q)),
    w_terms as materialized (%4$s),
    worded as materialized (select v.id, v.document_id, v.ordinal, %5$s as score from w_hits v where v.fits order by score desc, v.id limit $3)$sql$,
    p_library.id, p_library.language, pgshelf.word_filter(p_documents, p_chunks),
    pgshelf.word_weights(p_library.language, '(select count(*) from w_hits h where h.words @@ q.query)'), pgshelf.word_score())
$$;

-- What share of a library fulfils a filter, by a sample: ids are random, so the first in their order are one.
create or replace function pgshelf.word_share(p_library pgshelf.libraries, p_documents text, p_chunks text) returns text
  stable language sql set search_path = pg_catalog, pg_temp
as $$
  select case when p_documents = 'true' and p_chunks = 'true' then 'select 1::float8 as share'
    else format('select greatest(count(*) filter (where %s and %s), 0.5::float8) / greatest(count(*), 1) as share from ', p_documents, p_chunks)
      || case when p_chunks = 'true'
        then format('(select d.* from pgshelf.documents d where d.library_id = %L order by d.id limit 200) d', p_library.id)
        else format('(select c.* from pgshelf.chunks_s%s c where c.library_id = %L order by c.document_id, c.ordinal limit 400) c
          join pgshelf.documents d on d.id = c.document_id', p_library.shelf, p_library.id) end end
$$;

-- The chunks that fulfil a filter, found by an index of the filter's, that hold any of the words; null when no such index leads there.
create or replace function pgshelf.word_lead(
  p_library pgshelf.libraries, p_documents text, p_chunks text, p_indexed text, p_chunks_indexed text) returns text
  stable language sql set search_path = pg_catalog, pg_temp
as $$
  select case
    when p_documents <> 'true' then pgshelf.word_scan(
      format('(select d.* from pgshelf.documents d where d.library_id = %1$L and (select n.lead from w_next n) and %2$s and %3$s offset 0) d
      cross join lateral (select c.* from pgshelf.chunks_s%4$s c where c.library_id = %1$L and c.document_id = d.id and %5$s offset 0) c',
        p_library.id, p_indexed, p_documents, p_library.shelf, p_chunks),
      'v.words @@ (select p.every from w_plan p)')
    when p_chunks_indexed <> 'true' then pgshelf.word_scan(
      format('pgshelf.chunks_s%s c', p_library.shelf),
      format('c.library_id = %L and (select n.lead from w_next n) and %s and %s and v.words @@ (select p.every from w_plan p)',
        p_library.id, p_chunks_indexed, pgshelf.word_filter(p_documents, p_chunks))) end
$$;

-- A query for the chunks whose words can add up to p_least: without enough of them a chunk cannot, however often they stand in it. Null when
-- none can. The words come with the most that each can add, in falling order; beyond ten they are taken as there, to keep the query small.
create or replace function pgshelf.words_above(p_words tsquery[], p_most float8[], p_least float8) returns tsquery
  immutable parallel safe language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_least float8 := p_least - (select coalesce(sum(m.most), 0) from unnest(p_most[11:]) m(most));
  v_with tsquery;
  v_without tsquery;
begin
  if v_least <= 0 then
    return (select string_agg(w.word::text, ' | ')::tsquery from unnest(p_words) w(word));
  elsif (select coalesce(sum(m.most), 0) from unnest(p_most[:10]) m(most)) < v_least then
    return null;
  end if;
  v_with := case when p_most[1] >= v_least then p_words[1]
    else p_words[1] && pgshelf.words_above(p_words[2:10], p_most[2:10], v_least - p_most[1]) end;
  v_without := pgshelf.words_above(p_words[2:10], p_most[2:10], v_least);
  return coalesce(v_with || v_without, v_with, v_without);
end $$;

-- What is known before any row is read: the words that choose the first rows, all words (every), the other ones in falling order of the most
-- that they can add, whether p_cost, what it costs to look at all that fulfils the filter, is below that of the chunks which would be chosen
-- (few) or hold a word at all (fewer).
create or replace function pgshelf.word_plan(p_cost text) returns text
  immutable parallel safe language sql
as $$
  select format($sql$select coalesce(x.first && q.required, x.first) as first, coalesce(x.every && q.required, x.every) as every,
      coalesce(!! x.first && q.required, !! x.first) as beyond, x.others, x.most,
      %1$s < x.holders as fewer, %1$s < least(x.holders, greatest(1000, 5 * $3) / s.share) as few
    from w_size z, w_share s, w_typed q, lateral (
      select sum(y.chunks) as holders, string_agg(y.query::text, ' | ')::tsquery as every,
        (string_agg(y.query::text, ' | ') filter (where y.chosen))::tsquery as first,
        array_agg(y.query order by y.weight desc) filter (where not y.chosen) as others,
        array_agg(y.weight * 2.2::float8 order by y.weight desc) filter (where not y.chosen) as most
      from (select b.*, querytree(q.required) not in ('', 'T') is true or b.before < 1.5 * $3 / s.share
          or b.before + b.chunks <= greatest(200 * b.words / sqrt(s.share), 3 * $3 / s.share) as chosen
        from (select t.*, count(*) over () as words, sum(t.chunks) over (order by t.chunks, t.lexeme, t.prefix) - t.chunks as before
          from w_terms t) b) y) x
    where x.every is not null$sql$, p_cost)
$$;

-- Word candidates on a shelf of the library's own. The rarest words, of some hundred chunks, choose the first rows by the GIN index, and
-- every word scores. What the last of the best $3 of them has is what another row must reach, so no more rows are read than those with words
-- enough for it (as in MaxScore: Turtle, Flood, "Query evaluation: strategies and optimizations", 1995): the result is exact, and complete
-- when there are fewer than $3. A phrase that is required chooses by itself. Under a filter a sample tells its share of the library: so many
-- more rows are chosen first, or, when fewer than those fulfil it, an index of the filter's leads. Conditions that are read once keep what
-- has no turn from being executed.
create or replace function pgshelf.shelf_word_candidates(
  p_library pgshelf.libraries, p_documents text, p_chunks text, p_indexed text, p_chunks_indexed text) returns text
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_table text := 'pgshelf.chunks_s' || p_library.shelf;
  v_lead text := pgshelf.word_lead(p_library, p_documents, p_chunks, p_indexed, p_chunks_indexed);
  v_where text := format('c.library_id = %L and %s', p_library.id, pgshelf.word_filter(p_documents, p_chunks));
begin
  return concat_ws(E',\n    ',
    format('w_typed as materialized (select q.* from pgshelf.words_query(%L, $4) q)', p_library.language),
    format('w_size as materialized (select x.chunks::float8, x.bytes::float8 / x.chunks as mean from (
      select s.chunks, s.bytes from pgshelf.word_statistics s where s.library_id = %1$L and s.chunks > 0
      union all select count(*), sum(octet_length(c.text)) from %2$s c where c.library_id = %1$L
        and not exists (select 1 from pgshelf.word_statistics s where s.library_id = %1$L and s.chunks > 0) having count(*) > 0) x)', p_library.id, v_table),
    format('w_terms as materialized (%s)', pgshelf.word_weights(p_library.language, format('coalesce(
      (select t.chunks from pgshelf.terms t where t.library_id = %L and t.lexeme = q.lexeme and not q.prefix),
      (select count(*) from (select 1 from %s c where c.tsv @@ q.query limit 10000) x))', p_library.id, v_table))),
    format('w_share as materialized (%s)', pgshelf.word_share(p_library, p_documents, p_chunks)),
    format('w_plan as materialized (%s)', pgshelf.word_plan(
      -- a document is looked at in a fifth of the time of a chunk
      case p_indexed when 'true' then '(s.share + 0.2) * z.chunks' else 's.share * z.chunks' end)),
    format('w_first as materialized (%s)', pgshelf.word_scan(v_table || ' c', v_where
      || case when v_lead is null then '' else ' and (select not p.few from w_plan p)' end || ' and c.tsv @@ (select p.first from w_plan p)')),
    -- the last bits of a sum of floats depend on the order of its parts
    'w_least as materialized (select case when count(*) < $3 then 0 else min(f.score) * (1 - 1e-9::float8) end as least from w_first f)',
    format('w_next as materialized (select %s as lead, p.beyond && pgshelf.words_above(p.others, p.most, l.least) as others from w_plan p, w_least l)',
      case when v_lead is null then 'false' else 'p.few or p.fewer and p.others is not null and l.least = 0' end),
    format('w_second as materialized (%s)', pgshelf.word_scan(v_table || ' c', v_where
      || ' and (select n.others is not null and not n.lead from w_next n) and c.tsv @@ (select n.others from w_next n)')),
    'w_lead as materialized (' || v_lead || ')',
    format('worded as materialized (select x.* from (%sselect * from w_first%s union all select * from w_second) x order by x.score desc, x.id limit $3)',
      case when v_lead is null then '' else 'select * from w_lead union all ' end,
      case when v_lead is null then '' else ' where (select not n.lead from w_next n)' end));
end $$;

-- The best $3 chunks of a library for the words of $4, by BM25 (k1 1.2, b 0.75; Robertson, Zaragoza, "The Probabilistic Relevance Framework",
-- 2009), ties by id, among those that fulfil a filter as pgshelf.compile_filter writes it: CTEs, the last one `worded` (id, document_id,
-- ordinal, score). The length of a chunk is that of its text in bytes, which is known without reading its words and ranks as well.
create or replace function pgshelf.word_candidates(
  p_library pgshelf.libraries, p_documents text, p_chunks text, p_indexed text default 'true', p_chunks_indexed text default 'true') returns text
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_given text[] := array[p_documents, p_chunks, p_indexed, p_chunks_indexed];
begin
  for i in 1 .. 4 loop
    if v_given[i] <> 'true' then
      v_given[i] := '(' || v_given[i] || ')';
    end if;
  end loop;
  return case p_library.shelf when 0 then pgshelf.shared_word_candidates(p_library, v_given[1], v_given[2])
    else pgshelf.shelf_word_candidates(p_library, v_given[1], v_given[2], v_given[3], v_given[4]) end;
end $$;

-- Counts the words of a library that has a shelf of its own, for its searches: how many chunks hold a word, for those that more than one
-- in a thousand (and more than a hundred) hold; others are counted when they are searched. False when somebody else is counting.
create or replace function pgshelf.refresh_words(p_library uuid) returns boolean
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_shelf int := (select l.shelf from pgshelf.libraries l where l.id = p_library and l.shelf > 0 and l.deleted_at is null);
  v_chunks bigint;
  v_bytes bigint;
begin
  if v_shelf is null or not pg_try_advisory_xact_lock(x'776f7264'::int, hashtext(p_library::text)) then
    return false;
  end if;
  execute format('select count(*), coalesce(sum(octet_length(c.text)), 0) from pgshelf.chunks_s%s c', v_shelf) into v_chunks, v_bytes;
  delete from pgshelf.terms t where t.library_id = p_library;
  insert into pgshelf.terms (library_id, lexeme, chunks)
    select p_library, s.word, s.ndoc from ts_stat(format('select c.tsv from pgshelf.chunks_s%s c', v_shelf)) s
    where s.ndoc > greatest(100, v_chunks / 1000);
  insert into pgshelf.word_statistics (library_id, chunks, bytes) values (p_library, v_chunks, v_bytes)
    on conflict on constraint word_statistics_pkey do update set chunks = excluded.chunks, bytes = excluded.bytes, made_at = now();
  -- the scores of word searches are others now
  perform pgshelf.mark_libraries(array[p_library]);
  insert into pgshelf.change_log (library_id, kind, version) select l.id, 'library', l.version from pgshelf.libraries l where l.id = p_library;
  return true;
end $$;
