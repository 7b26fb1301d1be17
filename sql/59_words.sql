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
  required := pgshelf.required_words(p_language, p_query);
end $$;

-- What a typed query requires: its phrases and exclusions; null where there are none.
create or replace function pgshelf.required_words(p_language text, p_query text) returns tsquery
  immutable parallel safe language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  if p_query !~ '["“”„-]' then
    return null;
  end if;
  return (select string_agg(case when p.excluded then '!(' else '(' end || q.part || ')', ' & ')::tsquery
    from pgshelf.query_parts(p_query) p cross join lateral pgshelf.part_query(p_language, p.part, p.kind) q(part)
    where (p.excluded or p.kind = 'phrase') and q.part is not null);
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

-- The weight of a word: how often it was typed, by its inverse document frequency.
create or replace function pgshelf.word_weight(p_times int, p_chunks float8, p_all float8) returns float8
  immutable parallel safe language sql
  as $$ select p_times * ln((greatest(p_all, p_chunks) + 1) / (p_chunks + 0.5::float8)) $$;

-- How often a word stands in a chunk, from what ts_rank says for that one word and weights of 1: the sum of 1/j² for j up to the frequency,
-- over pi²/6, whose inverse is exact up to 255. Null where it does not stand there.
create or replace function pgshelf.word_frequency(p_rank text) returns text
  immutable parallel safe language sql
  as $$ select format('nullif(round(1 / (1.64493406685::float8 * (1 - %s)) - 0.5::float8), 0)', p_rank) $$;

-- The part of a score that is not written out: further words, and prefixes, for which the words that they stand for are counted.
create or replace function pgshelf.further_score(
  p_words tsvector, p_length float8, p_queries tsquery[], p_weights float8[], p_prefixes text[], p_prefix_weights float8[]) returns float8
  immutable parallel safe language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_score float8 := 0;
  v_often float8;
begin
  for i in 1 .. coalesce(cardinality(p_queries), 0) loop
    v_often := round(1 / (1.64493406685::float8 * (1 - ts_rank('{1,1,1,1}', p_words, p_queries[i])::float8)) - 0.5::float8);
    if v_often > 0 then
      v_score := v_score + p_weights[i] / (1 + p_length / v_often);
    end if;
  end loop;
  for i in 1 .. coalesce(cardinality(p_prefixes), 0) loop
    v_often := (select sum(cardinality(u.positions))::float8 from unnest(p_words) u where starts_with(u.lexeme, p_prefixes[i]));
    if v_often > 0 then
      v_score := v_score + p_prefix_weights[i] / (1 + p_length / v_often);
    end if;
  end loop;
  return v_score;
end $$;

-- The BM25 score of a chunk `v` (words, length as below) by the factors of a row `b`. The first p_written words are written out: that takes
-- a third of the time of a loop over them.
create or replace function pgshelf.word_score(p_written int) returns text
  immutable parallel safe language sql
as $$
  select format('%s + case when cardinality(b.words) > %2$s or b.prefixes is not null
      then pgshelf.further_score(v.words, v.length, b.words[%2$s + 1:], b.weights[%2$s + 1:], b.prefixes, b.prefix_weights) else 0 end',
    string_agg(format('coalesce(b.weight_%1$s / (1 + v.length / %2$s), 0)', i,
      pgshelf.word_frequency(format('ts_rank(''{1,1,1,1}'', v.words, b.word_%s)::float8', i))), ' + ' order by i), p_written)
  from generate_series(1, p_written) i
$$;

-- The words and weights of a row `x` as columns, for the scores that are written out: to look an array's element up for each chunk takes
-- a tenth of its score.
create or replace function pgshelf.written_words(p_written int) returns text
  immutable parallel safe language sql
as $$
  select string_agg(format('x.words[%1$s] as word_%1$s, x.weights[%1$s] as weight_%1$s', i), ', ' order by i) from generate_series(1, p_written) i
$$;

-- What a score needs of a chunk `c`: its words, taken out of TOAST once for all of them (an array does that), and its length as BM25 counts
-- it, by the mean of a row `b`.
create or replace function pgshelf.scored_words() returns text
  immutable parallel safe language sql
  as $$ select '(select (array[c.tsv])[1] as words, 1.2::float8 * (0.25::float8 + 0.75::float8 * octet_length(c.text) / b.mean) as length offset 0)' $$;

-- A shelf read for word candidates: p_from and p_where find the chunks `c`.
create or replace function pgshelf.word_scan(p_from text, p_where text, p_written int) returns text
  immutable parallel safe language sql
as $$
  select format('select c.id, c.document_id, c.ordinal, %s as score from w_plan b cross join %s cross join lateral %s v
    where %s order by score desc, c.id limit $3', pgshelf.word_score(p_written), p_from, pgshelf.scored_words(), p_where)
$$;

-- Word candidates on shelf 0, exactly: one pass over the library by the primary key, and the words are counted in what it finds.
create or replace function pgshelf.shared_word_candidates(p_library pgshelf.libraries, p_documents text, p_chunks text, p_written int) returns text
  stable language sql set search_path = pg_catalog, pg_temp
as $$
  select format($sql$w_typed as materialized (select q.* from pgshelf.words_query(%2$L, $4) q),
    w_size as materialized (select count(*)::float8 as chunks, sum(octet_length(c.text))::float8 / nullif(count(*), 0) as mean
      from pgshelf.chunks_s0 c where c.library_id = %1$L),
    w_hits as materialized (select c.id, c.document_id, c.ordinal, v.words, v.length,
        coalesce(v.words @@ (select q.required from w_typed q), true) and %3$s as fits
      from w_size b cross join pgshelf.chunks_s0 c cross join lateral %4$s v
      where c.library_id = %1$L and c.tsv @@ (select q.scored from w_typed q)),
    w_terms as materialized (select w.*, pgshelf.word_weight(w.times, w.chunks, z.chunks) as weight
      from (select q.*, (select count(*) from w_hits h where h.words @@ q.query) as chunks from pgshelf.query_words(%2$L, $4) q offset 0) w, w_size z
      where w.chunks > 0),
    w_plan as materialized (select x.*, %6$s from (select array_agg(t.query order by t.lexeme collate "C") filter (where not t.prefix) as words,
        array_agg(t.weight * 2.2::float8 order by t.lexeme collate "C") filter (where not t.prefix) as weights,
        array_agg(t.lexeme order by t.lexeme collate "C") filter (where t.prefix) as prefixes,
        array_agg(t.weight * 2.2::float8 order by t.lexeme collate "C") filter (where t.prefix) as prefix_weights from w_terms t) x),
    worded as materialized (select v.id, v.document_id, v.ordinal, %5$s as score from w_plan b cross join w_hits v where v.fits
      order by score desc, v.id limit $3)$sql$,
    p_library.id, p_library.language, pgshelf.word_filter(p_documents, p_chunks), pgshelf.scored_words(), pgshelf.word_score(p_written),
    pgshelf.written_words(p_written))
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
  p_library pgshelf.libraries, p_documents text, p_chunks text, p_indexed text, p_chunks_indexed text, p_written int) returns text
  stable language sql set search_path = pg_catalog, pg_temp
as $$
  select case
    when p_documents <> 'true' then pgshelf.word_scan(
      format('(select d.* from pgshelf.documents d where d.library_id = %1$L and (select n.lead from w_next n) and %2$s and %3$s offset 0) d
      cross join lateral (select c.* from pgshelf.chunks_s%4$s c where c.library_id = %1$L and c.document_id = d.id and %5$s offset 0) c',
        p_library.id, p_indexed, p_documents, p_library.shelf, p_chunks),
      'v.words @@ (select p.every from w_plan p)', p_written)
    when p_chunks_indexed <> 'true' then pgshelf.word_scan(
      format('pgshelf.chunks_s%s c', p_library.shelf),
      format('c.library_id = %L and (select n.lead from w_next n) and %s and %s and v.words @@ (select p.every from w_plan p)',
        p_library.id, p_chunks_indexed, pgshelf.word_filter(p_documents, p_chunks)), p_written) end
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

-- What is known before any row is read, in one row; none where there is no chunk or no word to score by: the words and prefixes that score,
-- with their weights, the mean length, the words that choose the first rows, all words (every), none of the first (beyond), the other ones in
-- falling order of the most that they can add, and whether to look at all that fulfils a filter costs less than the chunks which would be
-- chosen (few) or hold a word at all (fewer). p_share is the filter's share of the library, p_extra what finding a chunk by it costs,
-- compared with looking at it. A function, for its plans are kept: to plan them within each search took longer than many a search.
create or replace function pgshelf.word_plan(
  p_library uuid, p_shelf int, p_language text, p_query text, p_reach int, p_share float8, p_extra float8)
  returns table (words tsquery[], weights float8[], prefixes text[], prefix_weights float8[], mean float8,
    first tsquery, every tsquery, beyond tsquery, others tsquery[], most float8[], fewer boolean, few boolean)
  stable rows 1 language plpgsql set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_required tsquery := pgshelf.required_words(p_language, p_query);
  v_chunks float8;
  v_words record;
  v_counts bigint[];
begin
  -- few are counted in a moment, and may be many by now
  select s.chunks, s.bytes::float8 / s.chunks into v_chunks, mean from pgshelf.word_statistics s where s.library_id = p_library and s.chunks >= 100;
  if not found then
    execute format('select count(*), sum(octet_length(c.text))::float8 / nullif(count(*), 0) from pgshelf.chunks_s%s c where c.library_id = $1', p_shelf)
      into v_chunks, mean using p_library;
  end if;
  select array_agg(q.query) as queries, array_agg(q.prefix) as prefix, array_agg(q.lexeme) as lexemes, array_agg(q.times) as times,
      array_agg(t.chunks) as counts into v_words
    from pgshelf.query_words(p_language, p_query) q
    left join pgshelf.terms t on t.library_id = p_library and t.lexeme = q.lexeme and not q.prefix;
  v_counts := v_words.counts;
  if array_position(v_counts, null) is not null then
    execute format('select array_agg(coalesce(u.chunks, (select count(*) from (select 1 from pgshelf.chunks_s%s c where c.tsv @@ u.query limit 10000) x))
      order by u.place) from unnest($1, $2) with ordinality u(query, chunks, place)', p_shelf) into v_counts using v_words.queries, v_counts;
  end if;
  return query
    with w as materialized (
      select u.*, pgshelf.word_weight(u.times, u.chunks, v_chunks) as weight
      from unnest(v_words.queries, v_words.prefix, v_words.lexemes, v_words.times, v_counts) u(query, prefix, lexeme, times, chunks) where u.chunks > 0),
    x as (
      select sum(y.chunks) as holders, string_agg(y.query::text, ' | ')::tsquery as every,
        (string_agg(y.query::text, ' | ') filter (where y.chosen))::tsquery as first,
        array_agg(y.query order by y.weight desc) filter (where not y.chosen) as others,
        array_agg(y.weight * 2.2::float8 order by y.weight desc) filter (where not y.chosen) as most
      from (select b.*, querytree(v_required) not in ('', 'T') is true or b.before < 1.5 * p_reach / p_share
          or b.before + b.chunks <= greatest(100 * b.words / sqrt(p_share), 3 * p_reach / p_share) as chosen
        from (select w.*, count(*) over () as words, sum(w.chunks) over (order by w.chunks, w.lexeme collate "C", w.prefix) - w.chunks as before
          from w) b) y)
    select f.*, mean, coalesce(x.first && v_required, x.first), coalesce(x.every && v_required, x.every),
      coalesce(!! x.first && v_required, !! x.first), x.others, x.most,
      (p_share + p_extra) * v_chunks < x.holders,
      (p_share + p_extra) * v_chunks < least(x.holders, greatest(1000, 5 * p_reach) / p_share)
    from x, lateral (select array_agg(t.query order by t.lexeme collate "C") filter (where not t.prefix) as words,
        array_agg(t.weight * 2.2::float8 order by t.lexeme collate "C") filter (where not t.prefix) as weights,
        array_agg(t.lexeme order by t.lexeme collate "C") filter (where t.prefix) as prefixes,
        array_agg(t.weight * 2.2::float8 order by t.lexeme collate "C") filter (where t.prefix) as prefix_weights from w t) f where x.every is not null;
end $$;

-- Word candidates on a shelf of the library's own. The rarest words, of some hundred chunks, choose the first rows by the GIN index, and
-- every word scores. What the last of the best $3 of them has is what another row must reach, so no more rows are read than those with words
-- enough for it (as in MaxScore: Turtle, Flood, "Query evaluation: strategies and optimizations", 1995): the result is exact, and complete
-- when there are fewer than $3. A phrase that is required chooses by itself. Under a filter a sample tells its share of the library: so many
-- more rows are chosen first, or, when fewer than those fulfil it, an index of the filter's leads. Conditions that are read once keep what
-- has no turn from being executed.
create or replace function pgshelf.shelf_word_candidates(
  p_library pgshelf.libraries, p_documents text, p_chunks text, p_indexed text, p_chunks_indexed text, p_written int) returns text
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_table text := 'pgshelf.chunks_s' || p_library.shelf;
  v_lead text := pgshelf.word_lead(p_library, p_documents, p_chunks, p_indexed, p_chunks_indexed, p_written);
  v_where text := format('c.library_id = %L and %s', p_library.id, pgshelf.word_filter(p_documents, p_chunks));
begin
  return concat_ws(E',\n    ',
    -- for highlights: read where they are asked for
    format('w_typed as materialized (select q.* from pgshelf.words_query(%L, $4) q)', p_library.language),
    format('w_plan as materialized (select x.*, %s from (%s) s, lateral pgshelf.word_plan(%L, %s, %L, $4, $3, s.share, %s::float8) x)',
      pgshelf.written_words(p_written),
      pgshelf.word_share(p_library, p_documents, p_chunks), p_library.id, p_library.shelf, p_library.language,
      -- a document is looked at in a fifth of the time of a chunk
      case p_indexed when 'true' then 0.2 else 0 end),
    format('w_first as materialized (%s)', pgshelf.word_scan(v_table || ' c', v_where
      || case when v_lead is null then '' else ' and (select not p.few from w_plan p)' end || ' and c.tsv @@ (select p.first from w_plan p)', p_written)),
    -- the last bits of a sum of floats depend on the order of its parts
    'w_least as materialized (select case when count(*) < $3 then 0 else min(f.score) * (1 - 1e-9::float8) end as least from w_first f)',
    format('w_next as materialized (select %s as lead, p.beyond && pgshelf.words_above(p.others, p.most, l.least) as others from w_plan p, w_least l)',
      case when v_lead is null then 'false' else 'p.few or p.fewer and p.others is not null and l.least = 0' end),
    format('w_second as materialized (%s)', pgshelf.word_scan(v_table || ' c', v_where
      || ' and (select n.others is not null and not n.lead from w_next n) and c.tsv @@ (select n.others from w_next n)', p_written)),
    'w_lead as materialized (' || v_lead || ')',
    format('worded as materialized (select x.* from (%sselect * from w_first%s union all select * from w_second) x order by x.score desc, x.id limit $3)',
      case when v_lead is null then '' else 'select * from w_lead union all ' end,
      case when v_lead is null then '' else ' where (select not n.lead from w_next n)' end));
end $$;

-- The best $3 chunks of a library for the words of $4, by BM25 (k1 1.2, b 0.75; Robertson, Zaragoza, "The Probabilistic Relevance Framework",
-- 2009), ties by id, among those that fulfil a filter as pgshelf.compile_filter writes it: CTEs, the last one `worded` (id, document_id,
-- ordinal, score). The length of a chunk is that of its text in bytes, which is known without reading its words and ranks as well. p_query
-- says for about how many words the statement shall be fast; it finds the same for any other.
create or replace function pgshelf.word_candidates(
  p_library pgshelf.libraries, p_documents text, p_chunks text, p_indexed text default 'true', p_chunks_indexed text default 'true',
  p_query text default null) returns text
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_given text[] := array[p_documents, p_chunks, p_indexed, p_chunks_indexed];
  v_written int := least(coalesce(nullif(cardinality(string_to_array(p_query, ' ')), 0), 8), 16);
begin
  for i in 1 .. 4 loop
    if v_given[i] <> 'true' then
      v_given[i] := '(' || v_given[i] || ')';
    end if;
  end loop;
  return case p_library.shelf when 0 then pgshelf.shared_word_candidates(p_library, v_given[1], v_given[2], v_written)
    else pgshelf.shelf_word_candidates(p_library, v_given[1], v_given[2], v_given[3], v_given[4], v_written) end;
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
  -- who thought that there are others was wrong, and nothing changes
  update pgshelf.word_statistics w set made_at = now() where w.library_id = p_library and w.chunks = v_chunks and w.bytes = v_bytes;
  if found then
    return true;
  end if;
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
