//! The responses of the endpoints, in Kubernetes' form or as JSON. Paths, queries and headers are untrusted input.

use std::slice;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header};

use super::{
    entry::{CheckSnapshot, CheckState, HealthStatus},
    json,
    registry::{Health, is_name},
};
use crate::respond::accepts;

/// Maximum number of parameters of a query. Later parameters are ignored.
const MOST_PARAMETERS: usize = 64;
/// Maximum length of a query in bytes. A longer query is ignored.
const LONGEST_QUERY: usize = 4096;

/// A path of the endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Endpoint<'a> {
    Live,
    /// `readyz` or `healthz`, with the requested check, if there is one.
    Ready(&'static str, Option<&'a str>),
}

impl<'a> Endpoint<'a> {
    /// Returns the endpoint of a path, if there is one. Reads only the first two bytes of most other paths.
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

/// The parameters of a request.
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
        asked.exclude.sort_unstable();
        asked.exclude.dedup();
        asked
    }

    fn excludes(&self, name: &str) -> bool {
        self.exclude.contains(&name)
    }

    fn excluded(&self) -> usize {
        self.exclude.len()
    }
}

/// Makes the responses of the endpoints.
#[derive(Clone, Debug)]
pub(super) struct Teller {
    pub(super) health: Health,
    /// Whether the response contains reasons, times and durations.
    pub(super) with_reasons: bool,
}

impl Teller {
    pub(super) fn answer(
        &self,
        endpoint: Endpoint<'_>,
        query: Option<&str>,
        headers: &HeaderMap,
    ) -> Response<Bytes> {
        let query = Query::of(query.unwrap_or_default());
        let wants_json = accepts(headers, &["application/health+json", "application/json"]);
        let form = if wants_json == Some(true) { HealthFormat::Json } else { HealthFormat::Plain };
        let (endpoint, check) = match endpoint {
            // Liveness does not depend on the checks.
            Endpoint::Live => return self.live(form, &query),
            Endpoint::Ready(endpoint, check) => (endpoint, check),
        };
        if let Some(check) = check {
            return match self.health.one(check) {
                None => plain(StatusCode::NOT_FOUND, "no such check\n"),
                Some(check) => self.one(form, &query, &check),
            };
        }
        let mut checks = self.health.snapshot();
        let all = checks.len();
        match form {
            HealthFormat::Json => {
                checks.retain(|check| !query.excludes(&check.name));
                json::answer(whole(&checks), &checks, self.with_reasons)
            }
            HealthFormat::Plain => {
                let mut body = String::new();
                checks.retain(|check| {
                    let excluded = query.excludes(&check.name);
                    if excluded {
                        body.push_str(&format!("[+]{} excluded: ok\n", check.name));
                    } else {
                        self.line(&mut body, check);
                    }
                    !excluded
                });
                if query.excluded() > all - checks.len() {
                    body.push_str("warn: some health checks cannot be excluded: no matches\n");
                }
                let passed = whole(&checks) != HealthStatus::Fail;
                if passed && !query.verbose {
                    return plain(StatusCode::OK, "ok");
                }
                let word = if passed { "passed" } else { "failed" };
                body.push_str(&format!("{endpoint} check {word}\n"));
                plain(status(passed), body)
            }
        }
    }

    fn live(&self, form: HealthFormat, query: &Query<'_>) -> Response<Bytes> {
        match form {
            HealthFormat::Json => json::answer(HealthStatus::Pass, &[], false),
            HealthFormat::Plain if query.verbose => {
                plain(StatusCode::OK, "[+]ping ok\nlivez check passed\n")
            }
            HealthFormat::Plain => plain(StatusCode::OK, "ok"),
        }
    }

    fn one(&self, form: HealthFormat, query: &Query<'_>, check: &CheckSnapshot) -> Response<Bytes> {
        let passed = check.state == CheckState::Pass;
        match form {
            HealthFormat::Json => {
                let told = json::answer(check.status(), slice::from_ref(check), self.with_reasons);
                with_status(told, status(passed))
            }
            HealthFormat::Plain if passed && !query.verbose => plain(StatusCode::OK, "ok"),
            HealthFormat::Plain => {
                let mut body = String::new();
                self.line(&mut body, check);
                plain(status(passed), body)
            }
        }
    }

    fn line(&self, body: &mut String, check: &CheckSnapshot) {
        let name = &*check.name;
        let how = if check.critical { "failed" } else { "degraded" };
        body.push_str(&match (check.state, check.age) {
            (CheckState::Pass, _) => format!("[+]{name} ok\n"),
            (CheckState::Fail, Some(age)) if self.with_reasons => {
                let why = check.reason.as_deref().unwrap_or("no reason given");
                format!("[-]{name} {how}: {why} ({} s ago)\n", age.as_secs())
            }
            (CheckState::Fail, _) => format!("[-]{name} {how}: reason withheld\n"),
            (CheckState::Unknown, _) => format!("[-]{name} {how}: no verdict yet\n"),
        });
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum HealthFormat {
    Plain,
    Json,
}

fn whole(checks: &[CheckSnapshot]) -> HealthStatus {
    checks.iter().map(CheckSnapshot::status).max().unwrap_or(HealthStatus::Pass)
}

pub(super) fn status(passed: bool) -> StatusCode {
    if passed { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

fn with_status(mut response: Response<Bytes>, status: StatusCode) -> Response<Bytes> {
    *response.status_mut() = status;
    response
}

pub(super) fn plain(status: StatusCode, body: impl Into<Bytes>) -> Response<Bytes> {
    typed("text/plain; charset=utf-8", status, body.into())
}

pub(super) fn typed(content: &'static str, status: StatusCode, body: Bytes) -> Response<Bytes> {
    let mut response = with_status(Response::new(body), status);
    let length = HeaderValue::from(response.body().len());
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content));
    headers.insert(header::CONTENT_LENGTH, length);
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// Removes the body of a response to `HEAD`. The headers remain those of `GET`.
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
        let teller = Teller { health: health.clone(), with_reasons: false };
        let endpoint = Endpoint::of(path).unwrap();
        let response = teller.answer(endpoint, Some(query), &HeaderMap::new());
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
        fn fuzz_never_panics_and_never_echoes(
            path in "/(livez|readyz|healthz)?.{0,80}",
            query in "((verbose|exclude|.{0,9})=?(db|.{0,70})&?){0,70}",
            accept in "(application/(health[+])?json|[*]/[*]|.{0,9})([,;].{0,20}){0,9}",
        ) {
            let teller = Teller { health: Health::new(), with_reasons: true };
            let _db = teller.health.reporter("db").unwrap();
            let mut headers = HeaderMap::new();
            if let Ok(accept) = HeaderValue::from_str(&accept) {
                headers.insert(header::ACCEPT, accept);
            }
            if let Some(endpoint) = Endpoint::of(&path) {
                let answer = teller.answer(endpoint, Some(&query), &headers);
                prop_assert!(answer.body().len() < 200);
            }
        }
    }
}
