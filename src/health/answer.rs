//! What the endpoints say, in Kubernetes' form. Paths and queries come from strangers.

use bytes::Bytes;
use http::{HeaderValue, Method, Response, StatusCode, header};

use super::registry::{CheckState, Health, is_name};

/// Parameters and bytes of a query beyond these are not looked at.
const MOST_PARAMETERS: usize = 64;
const LONGEST_QUERY: usize = 4096;

/// One of our paths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Endpoint<'a> {
    Live,
    /// `/readyz` or `/healthz`, as it is called, and the one check that is asked for.
    Ready(&'static str, Option<&'a str>),
}

impl<'a> Endpoint<'a> {
    /// One look at the second byte is all that most other paths cost.
    #[inline]
    pub(super) fn of(path: &'a str) -> Option<Self> {
        match path.as_bytes() {
            [b'/', b'l' | b'r' | b'h', ..] => Self::look(path),
            _ => None,
        }
    }

    fn look(path: &'a str) -> Option<Self> {
        if path == "/livez" {
            return Some(Self::Live);
        }
        let (name, rest) = ["readyz", "healthz"]
            .into_iter()
            .find_map(|name| Some((name, path.strip_prefix('/')?.strip_prefix(name)?)))?;
        match rest.strip_prefix('/') {
            None if rest.is_empty() => Some(Self::Ready(name, None)),
            Some(check) if is_name(check) => Some(Self::Ready(name, Some(check))),
            _ => None,
        }
    }
}

/// What was asked for beside the path.
#[derive(Debug, Default)]
struct Query<'a> {
    verbose: bool,
    exclude: Vec<&'a str>,
}

impl<'a> Query<'a> {
    fn of(query: &'a str) -> Self {
        let mut asked = Self::default();
        if query.len() > LONGEST_QUERY {
            return asked;
        }
        for parameter in query.split('&').take(MOST_PARAMETERS) {
            let (key, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            match key {
                "verbose" => asked.verbose = true,
                "exclude" if is_name(value) => asked.exclude.push(value),
                _ => {}
            }
        }
        asked
    }
}

pub(super) fn answer(
    health: &Health,
    endpoint: Endpoint<'_>,
    query: Option<&str>,
) -> Response<Bytes> {
    let query = Query::of(query.unwrap_or_default());
    let (endpoint, check) = match endpoint {
        // That it answers is all that is asked.
        Endpoint::Live if query.verbose => {
            return plain(StatusCode::OK, "[+]ping ok\nlivez check passed\n");
        }
        Endpoint::Live => return plain(StatusCode::OK, "ok"),
        Endpoint::Ready(endpoint, check) => (endpoint, check),
    };
    if let Some(check) = check {
        return match health.check(check) {
            None => plain(StatusCode::NOT_FOUND, "no such check\n"),
            Some(CheckState::Pass) if !query.verbose => plain(StatusCode::OK, "ok"),
            Some(state) => {
                let mut body = String::new();
                line(&mut body, check, state);
                plain(status(state == CheckState::Pass), body)
            }
        };
    }
    let mut body = String::new();
    let (mut passed, mut excluded) = (true, 0);
    health.look(|name, state| {
        if query.exclude.contains(&name) {
            excluded += 1;
            body.push_str(&format!("[+]{name} excluded: ok\n"));
            return;
        }
        passed &= state == CheckState::Pass;
        line(&mut body, name, state);
    });
    let mut asked = query.exclude;
    asked.sort_unstable();
    asked.dedup();
    if asked.len() > excluded {
        body.push_str("warn: some health checks cannot be excluded: no matches\n");
    }
    if passed && !query.verbose {
        return plain(StatusCode::OK, "ok");
    }
    body.push_str(&format!("{endpoint} check {}\n", if passed { "passed" } else { "failed" }));
    plain(status(passed), body)
}

fn line(body: &mut String, name: &str, state: CheckState) {
    body.push_str(&match state {
        CheckState::Pass => format!("[+]{name} ok\n"),
        CheckState::Fail => format!("[-]{name} failed: reason withheld\n"),
        CheckState::Unknown => format!("[-]{name} failed: no verdict yet\n"),
    });
}

fn status(passed: bool) -> StatusCode {
    if passed { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

pub(super) fn plain(status: StatusCode, body: impl Into<Bytes>) -> Response<Bytes> {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    let length = HeaderValue::from(response.body().len());
    let headers = response.headers_mut();
    let text = HeaderValue::from_static("text/plain; charset=utf-8");
    headers.insert(header::CONTENT_TYPE, text);
    headers.insert(header::CONTENT_LENGTH, length);
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// `HEAD` is told the headers of `GET`.
pub(super) fn without_body_for(method: &Method, response: Response<Bytes>) -> Response<Bytes> {
    if method == Method::HEAD { response.map(|_| Bytes::new()) } else { response }
}

pub(super) fn is_asking(method: &Method) -> bool {
    method == Method::GET || method == Method::HEAD
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ask(health: &Health, path: &str, query: &str) -> (u16, String) {
        let response = answer(health, Endpoint::of(path).unwrap(), Some(query));
        let body = String::from_utf8(response.body().to_vec()).unwrap();
        (response.status().as_u16(), body)
    }

    #[test]
    fn which_paths_are_ours() {
        assert_eq!(Endpoint::of("/livez"), Some(Endpoint::Live));
        assert_eq!(Endpoint::of("/healthz"), Some(Endpoint::Ready("healthz", None)));
        assert_eq!(Endpoint::of("/readyz/a-b"), Some(Endpoint::Ready("readyz", Some("a-b"))));
        for other in [
            "",
            "/",
            "*",
            "/l",
            "/livez/",
            "/livez/x",
            "/livezz",
            "/readyz/",
            "/readyz/a/b",
            "/readyzx",
        ] {
            assert_eq!(Endpoint::of(other), None, "{other}");
        }
    }

    #[test]
    fn is_in_kubernetes_form() {
        let health = Health::new();
        assert_eq!(ask(&health, "/readyz", ""), (200, "ok".into()));
        let (db, search) = (health.reporter("db").unwrap(), health.reporter("search").unwrap());
        db.pass();
        search.fail();
        let failed = "[+]db ok\n[-]search failed: reason withheld\nreadyz check failed\n";
        assert_eq!(ask(&health, "/readyz", ""), (503, failed.into()));
        assert_eq!(ask(&health, "/readyz", "verbose"), (503, failed.into()));
        assert_eq!(ask(&health, "/healthz", "").0, 503);
        assert_eq!(ask(&health, "/livez", ""), (200, "ok".into()));
        let live = "[+]ping ok\nlivez check passed\n";
        assert_eq!(ask(&health, "/livez", "verbose=1"), (200, live.into()));
        assert_eq!(ask(&health, "/readyz", "exclude=search"), (200, "ok".into()));
        assert_eq!(
            ask(&health, "/readyz", "exclude=search&exclude=search&exclude=x&verbose"),
            (
                200,
                "[+]db ok\n[+]search excluded: ok\n\
                 warn: some health checks cannot be excluded: no matches\nreadyz check passed\n"
                    .into()
            )
        );
        assert_eq!(ask(&health, "/readyz/db", ""), (200, "ok".into()));
        let withheld = "[-]search failed: reason withheld\n";
        assert_eq!(ask(&health, "/readyz/search", ""), (503, withheld.into()));
        assert_eq!(ask(&health, "/readyz/nobody", "").0, 404);
    }

    #[test]
    fn a_query_without_end_is_not_looked_at() {
        let health = Health::new();
        let search = health.reporter("search").unwrap();
        search.fail();
        let many = "a=b&".repeat(MOST_PARAMETERS) + "exclude=search";
        assert_eq!(ask(&health, "/readyz", &many).0, 503);
        let long = "exclude=search&".to_owned() + &"x".repeat(LONGEST_QUERY);
        assert_eq!(ask(&health, "/readyz", &long).0, 503);
    }

    proptest! {
        #[test]
        fn never_panics_and_never_echoes(
            path in "/(livez|readyz|healthz)?.{0,80}",
            query in "((verbose|exclude|.{0,9})=?(db|.{0,70})&?){0,70}",
        ) {
            let health = Health::new();
            let _db = health.reporter("db").unwrap();
            if let Some(endpoint) = Endpoint::of(&path) {
                let answer = answer(&health, endpoint, Some(&query));
                prop_assert!(answer.body().len() < 200);
            }
        }
    }
}
