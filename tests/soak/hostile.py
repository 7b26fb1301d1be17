"""Texts that were written to harm: SQL, the small languages inside PostgreSQL and Python, Unicode, paths, headers."""

SQL = [
    "'", '"', "''", "\\'", "\\", "`", ";", "--", "/*", "*/", "$$", "$1", ":x", "?", "0x27", "%27",
    "' or '1'='1", "' or 1=1 --", '" or ""="', "') or ('1'='1", "1) or 1=1", "' and 1=0 union all select null, null --",
    "'; drop table public.canary; --", "\"; drop table public.canary; --", "'); delete from public.canary; --",
    "$$; drop table public.canary; $$", "\\'; drop table public.canary; --", "\\\\'; drop table public.canary; --",
    "x'; update public.canary set note = 'changed' where '1'='1", "1; select pg_sleep(9)", "' || pg_sleep(9) || '",
    "'; copy (select 1) to program 'touch x'; --", "E'\\047; drop table public.canary; --", "U&'\\0027",
    "'; set role postgres; --", "'; alter role current_user superuser; --", "'; create role mallory superuser; --",
    "chr(39) || '", "'::text", "a\x60b", "public.canary", "pgshelf.keys", "(select secret from public.canary)",
    "' and extractvalue(1, concat(0x7e, version())) --", "english'); drop table public.canary; --", "x' and (select count(*) from pg_sleep(9)) > 0 --",
    "1 and (select 1 from pg_sleep(9))", "' having 1=1 --", "' order by 100 --", "' group by 1 --", "'; truncate pgshelf.keys; --",
    "'; reset role; --", "'; set search_path = public; --", "'; listen x; --", "'; lock pgshelf.libraries; --", "'; vacuum; --",
    "'||(select rolname from pg_authid limit 1)||'", "' union select passwd from pg_shadow --", "lo_import('/etc/passwd')",
    "pg_read_file('/etc/passwd')", "dblink('host=localhost', 'select 1')", "current_setting('x')", "''||''", "'+'", "\'+\'", "pg_catalog.english",
]  # fmt: skip
LANGUAGES = [
    "$", "$.**", "$[*]", "$.a ? (@ == 1)", "$.** ? (@ like_regex \"^(a+)+$\")", "@ == 1", "strict $.a", "exists($.a)",
    "{}", "{a,b}", "{$,a}", "a.b.c", "a..b", ".", "..", ".a", "a.", "$where", "$expr", "$ne", "$or", "chunk.", "chunk.$text",
    "a & b", "a | !b", "a <-> b", "!", "!!a", "a:*", "a:*ABCD", "'a b':1A", "((((", "))))", "a &", "& | !", "\"", "\"a",
    "-", "-a", "--a", "- -", "a*", "*", "**", "\"a *\"", "<mark>", "%", "%%", "_", "%_%", "\\%", "(a+)+$", "(a|a)*b",
    "[", "(?=a)", "(?<!a)b", "\\1", "a{99999}", "(?i)", "***=a", "***:a", "\\m\\M", "[[:alpha:", "\\u00",
    "%s", "%n%n%n", "%x" * 20, "%(name)s", "%I %L", "{0}", "{}", "{0.__class__}", "{x!r}", "${jndi:ldap://localhost/a}",
    "${7*7}", "{{7*7}}", "<%= 7 * 7 %>", "#{7*7}", "__proto__", "constructor", "__class__", "<script>alert(1)</script>",
    "; id", "| id", "$(id)", "`id`", "& ping -c 9 localhost &", "null", "true", "NaN", "Infinity", "undefined", "{\"$gt\": \"\"}",
    "[]", "[1", "1e999", "-0", "0x10", "9" * 400, "1" + "0" * 30, "-9223372036854775809", "99999999999999999999",
    "infinity", "-infinity", "now", "epoch", "2020-01-01T00:00:00Z' or '1", "24:00", "0001-01-01 BC",
]  # fmt: skip
UNICODE: list[str | bytes] = [
    "\x00", "a\x00b", "\x01", "\x1b[31m", "\x7f", "\x85", "\u00a0", "\u200b", "\u202eabc", "\u2066a\u2069", "\u2028", "\ufeff",
    "\ufffd", "\ufffe", "\uffff", "\U0010ffff", "\ud800", "\udfff", "\ud83d", "a\ud800b", "\ue000", "\U000e0041", "раураl",
    "ａｄｍｉｎ", "ſ", "İ", "ß", "ǆ", "e\u0301" * 20, "Z\u0300\u0301\u0302\u0303" * 30, "👩‍👩‍👧‍👦", "שלום", "ʼ or ʼ1ʼ=ʼ1", "＇ or ＇1＇=＇1",
    b"\xc0\xaf", b"\xe0\x80\xa7", b"\xff\xfe", b"\xed\xa0\x80", b"\xc3", b"a\xf4\x90\x80\x80",
]  # fmt: skip
PATHS = [
    "../../../etc/passwd", "..\\..\\windows\\win.ini", "....//....//etc/passwd", "/etc/passwd", "%2e%2e%2f", "..%2f..%2f",
    "..;/", "file:///etc/passwd", "C:\\boot.ini", "\\\\host\\share", "~root", "/dev/zero", "/proc/self/environ", "a/b", "a//b",
    "a?b=c", "a#b", "a;b", "a%00b", "%", "%zz", "..", ".", "/", "//localhost/x", "http://localhost/", "con", "x" * 300, "x" * 5000,
    "a\r\nX-Injected: yes", "a\nX-Injected: yes", "a\r\n\r\n<html>", "a%0d%0aX-Injected: yes", "a\u010d\u010aX-Injected: yes",
    "00000000-0000-0000-0000-000000000000", "{00000000-0000-4000-8000-000000000000}", "urn:uuid:0", " a", "a ", "\t", "",
]  # fmt: skip
TEXTS: list[str | bytes] = [*dict.fromkeys(SQL + LANGUAGES + PATHS), *UNICODE]
NUMBERS = ["1e308", "-1e308", "1e-320", "1e999", "9" * 400, "-" + "9" * 30, "9223372036854775808", "-9223372036854775809",
    "2147483648", "-2147483649", "-1", "0", "-0.0", "0.1", "NaN", "Infinity", "true", "\"1\"", "null", "[]", "{}"]  # fmt: skip
