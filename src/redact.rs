//! Removes secrets from text before it is shown, and shortens it. No other module decides which text is a secret.
//!
//! Every text of this crate that contains input passes through this module: values in a
//! [`ConfigError`](crate::error::ConfigError), the output of `explain()`, `Debug` output, fields of events, reasons of
//! health checks and the texts of other crates' errors. Scheme, host, port and path of a URI are shown; userinfo, query
//! and fragment become [`MARKER`].
//!
//! # What is redacted
//!
//! | input | output |
//! |---|---|
//! | `http://user:password@search:8080/healthz?key=1#top` | `http://***@search:8080/healthz?***` |
//! | `user:password@search:5432` (no scheme) | `***@search:5432` |
//! | `/healthz?key` (a path with a query) | `/healthz?***` |
//! | `http://user:pass word` (no valid port, so it may be a password) | `http://***` |
//! | `authorization: Bearer abc` | `authorization: Bearer ***` |
//! | `host=db password=abc` | `host=db password=***` |
//!
//! The scanner is not a URI parser: parsers disagree about invalid URIs, and a secret must not depend on which parser
//! read it. If a text can be read in two ways, the reading that redacts more is used:
//!
//! - Everything between `//` and the last `@` before the query is userinfo, also a `/`. A path that contains an `@`
//!   hides the host.
//! - An authority that is not `host` or `host:port` is redacted up to the next `@`, also over quotes and spaces.
//! - A line break or tab does not end a URI, as in the URL standard. A space does: it is not valid in a URI. Where a
//!   whole value is known to be one URI, a space does not end it either.
//!
//! # Bounds
//!
//! At most [`MAX_SCAN`] bytes of the input are copied and scanned, whatever its length. A URI that continues beyond
//! them is redacted from its authority on. Shortened text ends with `…` and the full length: `aaaa… (10485760 bytes)`.

use std::fmt::{self, Debug, Display, Write};

/// Replaces a secret.
const MARKER: &str = "***";

/// Maximum length in bytes of a value in an error, in `explain()` and in `Debug` output.
pub(crate) const MAX_VALUE: usize = 256;

/// Maximum length in bytes of the remedy of a [`ConfigError`](crate::error::ConfigError) that contains input.
pub(crate) const MAX_REMEDY: usize = 1024;

/// Maximum length in bytes of an error's text in `Debug` output and in events.
pub(crate) const MAX_ERROR: usize = 512;

/// The number of bytes of an input that are copied and scanned.
pub(crate) const MAX_SCAN: usize = 4096;

/// The number of pieces that a formatter may write beyond [`MAX_SCAN`], only to measure the length.
const MAX_UNSEEN_PIECES: u32 = 4096;

/// Returns free text, in which URIs may occur, without secrets and with at most `max` bytes.
pub(crate) fn text(text: &str, max: usize) -> String {
    ScannedText::of(text).redacted(TextKind::Text, max)
}

/// Returns the value of a setting, which may be a URI as a whole, without secrets and with at most [`MAX_VALUE`] bytes.
pub(crate) fn value(value: &str) -> String {
    let scanned = ScannedText::of(value);
    let is_uri = scanned.text.contains("//")
        || scanned.text.contains('@')
        || !scanned.text.contains(char::is_whitespace);
    scanned.redacted(if is_uri { TextKind::Value } else { TextKind::Text }, MAX_VALUE)
}

/// Returns what `shown` displays, without secrets and with at most `max` bytes.
pub(crate) fn display(shown: &(impl Display + ?Sized), max: usize) -> String {
    ScannedText::formatted(format_args!("{shown}")).redacted(TextKind::Text, max)
}

/// Returns the `Debug` output of `shown`, without secrets and with at most `max` bytes.
pub(crate) fn debug(shown: &(impl Debug + ?Sized), max: usize) -> String {
    ScannedText::formatted(format_args!("{shown:?}")).redacted(TextKind::Text, max)
}

/// A value of another crate, redacted in the `Debug` output or in an event of this crate.
pub(crate) struct Redacted<'a, T: ?Sized>(pub(crate) &'a T);

impl<T: Debug + ?Sized> Debug for Redacted<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&debug(self.0, MAX_ERROR))
    }
}

impl<T: Display + ?Sized> Display for Redacted<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&display(self.0, MAX_ERROR))
    }
}

/// The value of a setting in `Debug` output: redacted as by [`value`], in quotes.
pub(crate) struct Value<'a>(pub(crate) &'a str);

impl Debug for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Debug::fmt(&value(self.0), f)
    }
}

// ===== Bounds =====

/// The first [`MAX_SCAN`] bytes of an input, and its length.
#[derive(Default)]
struct ScannedText {
    text: String,
    /// The length of the whole input in bytes, as far as it was measured.
    length: usize,
    /// The input is longer than the text.
    is_cut: bool,
    /// The number of pieces that were written after the text was full.
    unseen_pieces: u32,
}

impl ScannedText {
    fn of(text: &str) -> Self {
        let mut scanned = Self::default();
        let _ = scanned.write_str(text);
        scanned
    }

    fn formatted(shown: fmt::Arguments<'_>) -> Self {
        let mut scanned = Self::default();
        // An error ends the input here, whether `write_str` or the formatted value returned it.
        let _ = scanned.write_fmt(shown);
        scanned
    }

    fn redacted(&self, kind: TextKind, max: usize) -> String {
        let mut safe = String::with_capacity(self.text.len().min(max));
        match kind {
            TextKind::Text => scan(&self.text, self.is_cut, &mut safe),
            TextKind::Value => {
                let end = self.text.len();
                word(&self.text, end, self.is_cut, TextKind::Value, &mut safe);
            }
        }
        if !self.is_cut && safe.len() <= max {
            return safe;
        }
        let more = if self.unseen_pieces > MAX_UNSEEN_PIECES { "more than " } else { "" };
        let ending = format!("… ({more}{} bytes)", self.length);
        safe.truncate(prefix(&safe, max.saturating_sub(ending.len())).len());
        safe.push_str(&ending);
        safe
    }
}

impl Write for ScannedText {
    fn write_str(&mut self, piece: &str) -> fmt::Result {
        self.length = self.length.saturating_add(piece.len());
        if self.is_cut {
            self.unseen_pieces += 1;
            return if self.unseen_pieces > MAX_UNSEEN_PIECES { Err(fmt::Error) } else { Ok(()) };
        }
        let seen = prefix(piece, MAX_SCAN.saturating_sub(self.text.len()));
        self.text.push_str(seen);
        self.is_cut = seen.len() < piece.len();
        Ok(())
    }
}

/// Returns the longest prefix that has at most `max` bytes and ends at a character boundary.
fn prefix(text: &str, max: usize) -> &str {
    let mut end = max.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

// ===== Scanner =====

/// The kind of the input.
#[derive(Clone, Copy, PartialEq, Eq)]
enum TextKind {
    /// Free text: words are scanned one by one.
    Text,
    /// One value: a space does not end it.
    Value,
}

/// Returns whether the character ends a word. No URI contains such a character, except for line breaks in wrapped text.
fn is_gap(c: char) -> bool {
    c.is_whitespace() || c.is_control() || matches!(c, '"' | '<' | '>' | '`')
}

/// Returns the position of the first gap at or after `from`.
fn word_end(text: &str, from: usize) -> usize {
    text[from..].find(is_gap).map_or(text.len(), |at| from + at)
}

/// Appends `text` word by word, without the secrets of each word. `is_cut`: the input continues after `text`.
fn scan(text: &str, is_cut: bool, safe: &mut String) {
    let mut at = 0;
    // The previous word was the name of an authentication scheme.
    let mut is_credential = false;
    while at < text.len() {
        let gap = text[at..].find(|c| !is_gap(c)).unwrap_or(text.len() - at);
        safe.push_str(&text[at..at + gap]);
        at += gap;
        let words = &text[at..];
        let end = wrapped_end(words);
        let one = &words[..end];
        if is_credential && !is_about_authentication(one) {
            safe.push_str(MARKER);
            is_credential = false;
            at += end;
            continue;
        }
        is_credential = names_scheme(one);
        let is_open = is_cut && end == words.len();
        at += word(words, end, is_open, TextKind::Text, safe);
    }
}

/// Returns whether the word is the name of an authentication scheme that credentials follow (RFC 9110 §11.4).
fn names_scheme(one: &str) -> bool {
    let name = one.rsplit(|c: char| !c.is_ascii_alphanumeric()).next().unwrap_or_default();
    name.eq_ignore_ascii_case("bearer") || name == "Basic"
}

/// Returns whether the word after `bearer` or `Basic` continues a sentence.
fn is_about_authentication(one: &str) -> bool {
    let name = one.trim_matches(|c: char| !c.is_ascii_alphanumeric());
    ["auth", "authentication", "authorization", "credentials", "scheme", "token", "tokens"]
        .iter()
        .any(|known| name.eq_ignore_ascii_case(known))
}

/// Returns the end of the first word. A URI continues after a line break or tab, as it does in wrapped text.
fn wrapped_end(words: &str) -> usize {
    let mut end = word_end(words, 0);
    loop {
        let one = &words[..end];
        let query = one.find('?');
        let is_uri = one.contains("//")
            || query.is_some_and(|query| one[..query].contains('/') || one[query..].contains('='));
        let gap = words[end..].find(|c| !is_gap(c)).unwrap_or_default();
        let gap = &words[end..end + gap];
        // A line break or tab, as a character or as an escape in `Debug` output.
        let is_line_end =
            gap.chars().any(|c| c.is_control() || matches!(c, '\u{2028}' | '\u{2029}'))
                || ["\\n", "\\r", "\\t"].iter().any(|escape| one.ends_with(escape));
        let is_break = is_line_end && gap.chars().all(|c| c.is_whitespace() || c.is_control());
        // Without a gap the text ends here, so each round moves `end` forward.
        if !is_uri || !is_break || gap.is_empty() {
            return end;
        }
        let next = word_end(words, end + gap.len());
        // The next line begins another URI.
        let scheme = words[end + gap.len()..next].split_once("://").map(|(scheme, _)| scheme);
        let is_in_scheme = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.');
        if !one.ends_with("//") && scheme.is_some_and(|scheme| scheme.chars().all(is_in_scheme)) {
            return end;
        }
        end = next;
    }
}

/// Appends the word that ends at `end`, without its secrets. Returns the number of bytes of `words` that were consumed,
/// which is more than `end` if a secret may continue beyond the word. `is_open`: the input continues after the word.
fn word(words: &str, end: usize, is_open: bool, kind: TextKind, safe: &mut String) -> usize {
    let one = &words[..end];
    let lead = one.len() - one.trim_start_matches(['(', '[', '{', '\'', '=', ',']).len();
    let authority = if one[lead..].starts_with("//") {
        Some(lead + 2)
    } else {
        one.find("://").map(|scheme| scheme + 3)
    };
    let query = one.find(['?', '#']);
    if let Some(shown) = secret_parameter(one) {
        // Anything but a name before an `@` may be userinfo as well.
        let is_in_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '=');
        if one[..shown].chars().all(is_in_name) || !one[shown..].contains('@') {
            safe.push_str(&one[..shown]);
        }
        safe.push_str(MARKER);
        return end;
    }
    match authority.filter(|at| query.is_none_or(|query| *at <= query)) {
        // Credentials precede the scheme: `user:password@http://host`.
        Some(at) if one[..at].contains('@') => {
            safe.push_str(MARKER);
            end
        }
        Some(at) => with_authority(words, end, at, is_open, safe),
        None => {
            without_authority(one, is_open, kind, safe);
            end
        }
    }
}

/// Appends a word whose authority begins at `at`. Returns the number of bytes of `words` that were consumed.
fn with_authority(words: &str, end: usize, at: usize, is_open: bool, safe: &mut String) -> usize {
    let one = &words[..end];
    safe.push_str(&one[..at]);
    let opening = one[..at].chars().next();
    let path_end = one[at..].find(['?', '#']).map_or(end, |query| at + query);
    if is_open && path_end == end {
        // There may be an `@` in the part that was cut off.
        safe.push_str(MARKER);
        return end;
    }
    if let Some(userinfo) = one[at..path_end].rfind('@') {
        safe.push_str(MARKER);
        safe.push('@');
        path_and_query(&one[at + userinfo + 1..], opening, true, safe);
        return end;
    }
    let host_end = one[at..path_end].find(['/', '\\']).map_or(path_end, |path| at + path);
    // Punctuation may follow a URI without a path.
    let punctuation: &[char] = if host_end == end { &PUNCTUATION } else { &[] };
    if is_host_and_port(one[at..host_end].trim_end_matches(punctuation)) {
        path_and_query(&one[at..], opening, true, safe);
        return end;
    }
    safe.push_str(MARKER);
    // Not a host and port, so it may be a user and a part of the password: the following text is the rest of it.
    let next_uri = words[end..].find("://").map_or(words.len(), |next| end + next);
    match words[host_end..next_uri].find('@') {
        Some(found) => end.max(word_end(words, host_end + found)),
        None if is_open => end,
        None => {
            path_and_query(&one[host_end..], opening, true, safe);
            end
        }
    }
}

/// Appends a word without `//`.
fn without_authority(one: &str, is_open: bool, kind: TextKind, safe: &mut String) {
    if is_open && (kind == TextKind::Value || one.contains(':')) && !one.starts_with('/') {
        safe.push_str(MARKER);
        return;
    }
    let needs_colon = kind == TextKind::Text || one.starts_with('/');
    let userinfo = one.rfind('@').filter(|at| !needs_colon || one[..*at].contains(':'));
    let query = one.find('?');
    match (userinfo, query) {
        (Some(at), None) => {
            safe.push_str(MARKER);
            safe.push('@');
            path_and_query(&one[at + 1..], None, kind == TextKind::Value, safe);
        }
        (Some(_), Some(query)) => {
            let host_end = one[..query].find('/').unwrap_or(query);
            if is_host_and_port(&one[..host_end]) && !one[..query].contains('@') {
                path_and_query(one, None, true, safe);
            } else {
                safe.push_str(MARKER);
            }
        }
        (None, _) => path_and_query(one, one.chars().next(), kind == TextKind::Value, safe),
    }
}

/// Appends everything after the userinfo. `opening` is the first character of the word: its counterpart at the end is
/// shown.
fn path_and_query(rest: &str, opening: Option<char>, is_uri: bool, safe: &mut String) {
    let query = rest.find(['?', '#']).filter(|query| {
        let (path, query) = (&rest[..*query], &rest[query + 1..]);
        !query.is_empty() && (is_uri || path.contains('/') || query.contains('='))
    });
    // A URI inside of the path, percent-encoded: `%3A%2F%2F` is `://`.
    let path = &rest[..query.unwrap_or(rest.len())];
    let encoded = path.as_bytes().windows(9).position(|at| at.eq_ignore_ascii_case(b"%3a%2f%2f"));
    let shown = match (encoded, query) {
        (Some(encoded), _) => encoded,
        (None, Some(query)) => query + 1,
        (None, None) => return safe.push_str(rest),
    };
    safe.push_str(&rest[..shown]);
    safe.push_str(MARKER);
    let closing = match opening {
        Some('(') => ')',
        Some('[') => ']',
        Some('{') => '}',
        Some('\'') => '\'',
        _ => return,
    };
    let end = rest.trim_end_matches([':', ',', '.', ';']).len();
    if rest[shown..end].ends_with(closing) {
        safe.push_str(&rest[end - closing.len_utf8()..]);
    }
}

/// Punctuation that may follow a URI in a sentence.
const PUNCTUATION: [char; 9] = [')', ',', '.', ';', ':', '\'', '!', '}', '…'];

/// Returns whether this is a valid authority without userinfo. Otherwise it may be the beginning of userinfo.
fn is_host_and_port(authority: &str) -> bool {
    if authority == MARKER {
        return true;
    }
    let (host, port) = match authority.strip_prefix('[') {
        Some(address) => match address.split_once(']') {
            Some((host, port)) => (host, port.strip_prefix(':').unwrap_or(port)),
            None => return false,
        },
        None => match authority.split_once(':') {
            Some((_, "")) => return false,
            Some(parts) => parts,
            None => (authority, ""),
        },
    };
    let port = port.trim_end_matches(']');
    let is_in_host = |c: char| {
        c.is_alphanumeric()
            || !c.is_ascii()
            || is_gap(c)
            || matches!(c, '-' | '.' | '_' | '~' | '%' | ':')
    };
    port.chars().all(|c| c.is_ascii_digit() || is_gap(c))
        && host.trim_end_matches(']').chars().all(is_in_host)
}

/// Returns the position after the `=` of a parameter such as `password=abc`, alone or in a list. `None` if the other
/// rules redact it.
fn secret_parameter(one: &str) -> Option<usize> {
    let plain = one.find(['?', '#', '@']).into_iter().chain(one.find("//")).min();
    let plain = &one[..plain.unwrap_or(one.len())];
    let mut equals = plain.match_indices('=').map(|(at, _)| at);
    let is_secret = |at: &usize| {
        let name = plain[..*at].rsplit(['&', ';', ',', '(', '{', '/']).next().unwrap_or_default();
        let name = name.to_ascii_lowercase().replace(['-', '_'], "");
        SECRET_NAMES.iter().any(|known| name.ends_with(known))
    };
    equals.find(is_secret).map(|at| at + 1)
}

/// The suffixes of the names of parameters whose values are secrets, without `-` and `_`.
const SECRET_NAMES: [&str; 10] = [
    "password",
    "passwd",
    "pwd",
    "secret",
    "token",
    "apikey",
    "accesskey",
    "authorization",
    "credential",
    "cookie",
];

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn scheme_host_port_and_path_are_shown() {
        for (input, output) in [
            ("http://search:8080/healthz", "http://search:8080/healthz"),
            (
                "http://user:password@search:8080/healthz?key=1#top",
                "http://***@search:8080/healthz?***",
            ),
            ("HTTPS://User@[::1]:443/a/b#top", "HTTPS://***@[::1]:443/a/b#***"),
            ("http://[fe80::1%25eth0]/?", "http://[fe80::1%25eth0]/?"),
            ("http://us%65r:p%40ss@host/", "http://***@host/"),
            ("http://user:p@ss@host/", "http://***@host/"),
            ("http://user:pa/ss@host/p", "http://***@host/p"),
            ("http://user:pa?ss@host/p", "http://***"),
            ("http://host/p?key", "http://host/p?***"),
            ("http://host?key=a@b", "http://host?***"),
            ("//user:password@host/p", "//***@host/p"),
            ("/healthz?key=1", "/healthz?***"),
            ("/healthz", "/healthz"),
            ("user:password@host:5432", "***@host:5432"),
            ("search:8080", "search:8080"),
            ("http://host/to/http%3A%2F%2Fuser%3Apassword%40other/", "http://host/to/http***"),
            ("250ms", "250ms"),
            ("off", "off"),
        ] {
            assert_eq!(value(input), output, "{input}");
            assert_eq!(text(input, 256), output, "{input}");
        }
        assert_eq!(value("token@host/p"), "***@host/p");
        assert_eq!(value("http://user:pass word@host/p"), "http://***@host/p");
        assert_eq!(value("http://user:12 34@host/p"), "http://***@host/p");
        assert_eq!(value("http://us er:12 34@host/p"), "http://***@host/p");
    }

    #[test]
    fn uris_are_found_in_text() {
        for (input, output) in [
            (
                "error sending request for url (http://u:p@host/p?key=a): refused",
                "error sending request for url (http://***@host/p?***): refused",
            ),
            ("see 'http://u:p@host/p?key=a', or not", "see 'http://***@host/p?***', or not"),
            ("url: \"http://u:p@host/p?key=a\" }", "url: \"http://***@host/p?***\" }"),
            ("[http://a:1, http://b:2]", "[http://a:1, http://b:2]"),
            ("http://u:p@a/\nhttp://u:p@b/ end", "http://***@a/\nhttp://***@b/ end"),
            ("http://user:pass\nword@host/p?key=a\n  bcd end", "http://***@host/p?*** end"),
            ("http://user:pass word@host/p failed", "http://*** failed"),
            ("http://user:pass\"word@host/p failed", "http://*** failed"),
            ("http://host:8080: refused", "http://host:8080: refused"),
            // The two characters of an escaped line break, at the end.
            ("http://u:p@host/\\n", "http://***@host/\\n"),
            ("http://u:p@host/?key=a\\n  \n", "http://***@host/?***  \n"),
            ("GET /p?key=a failed", "GET /p?*** failed"),
            ("what? really?! up/down?", "what? really?! up/down?"),
            ("mail me@example.com at 12:30", "mail me@example.com at 12:30"),
            ("authorization: Bearer abc.def end", "authorization: Bearer *** end"),
            (
                "{\"authorization\": \"Basic dXNlcg==\"}",
                "{\"authorization\": \"Basic ***\"}".trim_end(),
            ),
            ("the bearer token expired", "the bearer token expired"),
            ("host=db user=me password=p@ss port=1", "host=db user=me password=*** port=1"),
        ] {
            assert_eq!(text(input, 256), output, "{input}");
        }
    }

    #[test]
    fn long_text_ends_with_its_length() {
        let long = "ä".repeat(5 << 20);
        let short = text(&long, 256);
        assert!(short.len() <= 256 && short.ends_with("ä… (10485760 bytes)"), "{short}");
        assert_eq!(text(&"a".repeat(256), 256), "a".repeat(256));
        assert!(text(&"a".repeat(257), 256).ends_with("a… (257 bytes)"));
        let hidden = format!("http://user:{long}@host/");
        assert_eq!(text(&hidden, 256), "http://***… (10485778 bytes)");
        assert_eq!(value(&hidden), "http://***… (10485778 bytes)");
        assert!(debug(&"\n".repeat(1 << 20), 256).contains("… (more than "));
    }

    #[test]
    fn redaction_is_bounded_in_memory() {
        struct Endless;
        impl Display for Endless {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                loop {
                    f.write_str("a")?;
                }
            }
        }
        assert!(display(&Endless, 256).contains("a… (more than "));
    }

    /// URIs with secrets in userinfo and query, also in forms that are easily misread.
    fn secret_uri() -> impl Strategy<Value = String> {
        let scheme = prop_oneof![Just("http"), Just("HTTPS"), Just("gRPC+tls"), Just("redis")];
        let userinfo = "[a-zA-Z0-9%.~!$&()*+,;=:@/'{}|-]{0,6}";
        let query = "[a-zA-Z0-9%.~!$&()*+,;=:@/?#'{}|-]{0,6}";
        let host = prop_oneof![
            Just("search"),
            Just("[::1]"),
            Just("10.0.0.1:80"),
            Just("[fe80::1%25eth0]:8080")
        ];
        (scheme, userinfo, userinfo, host, query).prop_map(|(scheme, user, password, host, query)| {
            format!("{scheme}://{user}SECRET{user}:{password}SECRET{password}@{host}/healthz?{query}SECRET{query}")
        })
    }

    proptest! {
        #[test]
        fn no_secret_of_a_uri_is_shown(
            uri in secret_uri(),
            before in "[a-z(:'\"\n =?/@]{0,8}",
            after in "[a-z):'\"\n .,@?/]{0,8}",
            wrap in any::<prop::sample::Index>(),
            max in 0usize..600,
        ) {
            prop_assert!(!value(&uri).contains("SECRET"), "{}", value(&uri));
            let sentence = format!("{before}{uri}{after}");
            let shown = text(&sentence, 1000);
            prop_assert!(!shown.contains("SECRET"), "{sentence:?} {shown:?}");
            let quoted = debug(&sentence, 1000);
            prop_assert!(!quoted.contains("SECRET"), "{quoted:?}");
            let at = wrap.index(uri.len());
            let wrapped = format!("{}\r\n\t{}", &uri[..at], &uri[at..]);
            // A line break inside of the scheme makes two words, and so does another scheme after it.
            if at > uri.find("://").unwrap_or_default() && uri.matches("://").count() == 1 {
                let shown = text(&wrapped, 1000);
                prop_assert!(!shown.contains("SEC") && !shown.contains("RET"), "{wrapped:?} {shown:?}");
            }
            let short = text(&sentence, max);
            prop_assert!(short.len() <= max.max(32));
            prop_assert!(!short.contains("SECRET"));
        }

        #[test]
        fn redacted_text_is_not_changed_again(uri in secret_uri(), before in "[a-z(' ]{0,8}") {
            let once = text(&format!("{before}{uri}"), 1000);
            prop_assert_eq!(text(&once, 1000), once);
        }

        #[test]
        fn any_text_is_redacted_without_a_panic(any in ".{0,200}", max in 0usize..99) {
            prop_assert!(text(&any, max).len() <= max.max(32));
            prop_assert!(value(&any).len() <= MAX_VALUE);
        }
    }
}
