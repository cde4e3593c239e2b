//! The responses of the endpoints, in Kubernetes' form or as JSON. Paths, queries and headers are untrusted input.

use std::slice;

use http::{HeaderMap, Response, StatusCode};

use super::{
    entry::{CheckSnapshot, CheckState, HealthStatus},
    json::json_response,
    registry::{Health, is_name},
    response::{status, with_status},
};
use crate::{
    endpoint::{EndpointBody, plain},
    respond::accepts,
};

/// Maximum number of parameters of a query. Later parameters are ignored.
const MAX_PARAMETERS: usize = 64;
/// Maximum length of a query in bytes. A longer query is ignored.
const MAX_QUERY_LENGTH: usize = 4096;

/// One of the health routes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HealthRoute<'a> {
    Live,
    /// `readyz` or `healthz`, with the requested check, if there is one.
    Ready(&'static str, Option<&'a str>),
}

impl<'a> HealthRoute<'a> {
    /// Returns the route of a path, if it is one. Reads only the first two bytes of most other paths.
    #[inline]
    pub(super) fn of(path: &'a str) -> Option<Self> {
        match path.as_bytes() {
            [b'/', b'l' | b'r' | b'h', ..] => Self::parse(path),
            _ => None,
        }
    }

    fn parse(path: &'a str) -> Option<Self> {
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
        let mut parsed = Self::default();
        if query.len() > MAX_QUERY_LENGTH {
            return parsed;
        }
        for parameter in query.split('&').take(MAX_PARAMETERS) {
            let (key, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            match key {
                "verbose" => parsed.verbose = true,
                "exclude" if is_name(value) => parsed.exclude.push(value),
                _ => {}
            }
        }
        parsed.exclude.sort_unstable();
        parsed.exclude.dedup();
        parsed
    }

    fn excludes(&self, name: &str) -> bool {
        self.exclude.contains(&name)
    }
}

/// The routes of the health endpoints.
#[derive(Clone, Debug)]
pub struct HealthRoutes {
    pub(super) health: Health,
    /// The response contains reasons, times and durations.
    pub(super) with_reasons: bool,
}

impl HealthRoutes {
    pub(super) fn new(health: Health) -> Self {
        Self { health, with_reasons: false }
    }

    pub(super) fn respond_to(
        &self,
        route: HealthRoute<'_>,
        query: Option<&str>,
        headers: &HeaderMap,
    ) -> Response<EndpointBody> {
        let query = Query::of(query.unwrap_or_default());
        let wants_json = accepts(headers, &["application/health+json", "application/json"]);
        let format =
            if wants_json == Some(true) { HealthFormat::Json } else { HealthFormat::Plain };
        let (name, check) = match route {
            // Liveness does not depend on the checks.
            HealthRoute::Live => return self.live(format, &query),
            HealthRoute::Ready(name, check) => (name, check),
        };
        if let Some(check) = check {
            return match self.health.check_snapshot(check) {
                None => plain(StatusCode::NOT_FOUND, "no such check\n"),
                Some(check) => self.single(format, &query, &check),
            };
        }
        let mut checks = self.health.snapshot();
        let all = checks.len();
        match format {
            HealthFormat::Json => {
                checks.retain(|check| !query.excludes(&check.name));
                json_response(overall(&checks), &checks, self.with_reasons)
            }
            HealthFormat::Plain => {
                let mut body = String::new();
                checks.retain(|check| {
                    let excluded = query.excludes(&check.name);
                    if excluded {
                        body.push_str(&format!("[+]{} excluded: ok\n", check.name));
                    } else {
                        self.write_line(&mut body, check);
                    }
                    !excluded
                });
                if query.exclude.len() > all - checks.len() {
                    body.push_str("warn: some health checks cannot be excluded: no matches\n");
                }
                let passed = overall(&checks) != HealthStatus::Fail;
                if passed && !query.verbose {
                    return plain(StatusCode::OK, "ok");
                }
                let word = if passed { "passed" } else { "failed" };
                body.push_str(&format!("{name} check {word}\n"));
                plain(status(passed), body)
            }
        }
    }

    fn live(&self, format: HealthFormat, query: &Query<'_>) -> Response<EndpointBody> {
        match format {
            HealthFormat::Json => json_response(HealthStatus::Pass, &[], false),
            HealthFormat::Plain if query.verbose => {
                plain(StatusCode::OK, "[+]ping ok\nlivez check passed\n")
            }
            HealthFormat::Plain => plain(StatusCode::OK, "ok"),
        }
    }

    fn single(
        &self,
        format: HealthFormat,
        query: &Query<'_>,
        check: &CheckSnapshot,
    ) -> Response<EndpointBody> {
        let passed = check.state == CheckState::Pass;
        match format {
            HealthFormat::Json => {
                let response =
                    json_response(check.status(), slice::from_ref(check), self.with_reasons);
                with_status(response, status(passed))
            }
            HealthFormat::Plain if passed && !query.verbose => plain(StatusCode::OK, "ok"),
            HealthFormat::Plain => {
                let mut body = String::new();
                self.write_line(&mut body, check);
                plain(status(passed), body)
            }
        }
    }

    fn write_line(&self, body: &mut String, check: &CheckSnapshot) {
        let name = &*check.name;
        let effect = if check.critical { "failed" } else { "degraded" };
        body.push_str(&match (check.state, check.age) {
            (CheckState::Pass, _) => format!("[+]{name} ok\n"),
            (CheckState::Fail, Some(age)) if self.with_reasons => {
                let reason = check.reason.as_deref().unwrap_or("no reason given");
                format!("[-]{name} {effect}: {reason} ({} s ago)\n", age.as_secs())
            }
            (CheckState::Fail, _) => format!("[-]{name} {effect}: reason withheld\n"),
            (CheckState::Unknown, _) => format!("[-]{name} {effect}: no verdict yet\n"),
        });
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum HealthFormat {
    Plain,
    Json,
}

fn overall(checks: &[CheckSnapshot]) -> HealthStatus {
    checks.iter().map(CheckSnapshot::status).max().unwrap_or(HealthStatus::Pass)
}

#[cfg(test)]
mod tests {
    use http::{HeaderValue, header};
    use proptest::prelude::*;

    use super::*;

    fn get(health: &Health, path: &str, query: &str) -> (u16, String) {
        let responder = HealthRoutes::new(health.clone());
        let route = HealthRoute::of(path).unwrap();
        let response = responder.respond_to(route, Some(query), &HeaderMap::new());
        let body = String::from_utf8(response.body().bytes().to_vec()).unwrap();
        (response.status().as_u16(), body)
    }

    #[test]
    fn only_the_documented_paths_are_endpoints() {
        assert_eq!(HealthRoute::of("/livez"), Some(HealthRoute::Live));
        assert_eq!(HealthRoute::of("/healthz"), Some(HealthRoute::Ready("healthz", None)));
        assert_eq!(HealthRoute::of("/readyz/a-b"), Some(HealthRoute::Ready("readyz", Some("a-b"))));
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
            assert_eq!(HealthRoute::of(other), None, "{other}");
        }
    }

    #[test]
    fn plain_response_has_the_form_of_kubernetes() {
        let health = Health::new();
        assert_eq!(get(&health, "/readyz", ""), (200, "ok".into()));
        let (db, search) = (health.reporter("db").unwrap(), health.reporter("search").unwrap());
        db.pass();
        search.fail();
        let failed = "[+]db ok\n[-]search failed: reason withheld\nreadyz check failed\n";
        assert_eq!(get(&health, "/readyz", ""), (503, failed.into()));
        assert_eq!(get(&health, "/readyz", "verbose"), (503, failed.into()));
        assert_eq!(get(&health, "/healthz", "").0, 503);
        assert_eq!(get(&health, "/livez", ""), (200, "ok".into()));
        let live = "[+]ping ok\nlivez check passed\n";
        assert_eq!(get(&health, "/livez", "verbose=1"), (200, live.into()));
        assert_eq!(get(&health, "/readyz", "exclude=search"), (200, "ok".into()));
        assert_eq!(
            get(&health, "/readyz", "exclude=search&exclude=search&exclude=x&verbose"),
            (
                200,
                "[+]db ok\n[+]search excluded: ok\n\
                 warn: some health checks cannot be excluded: no matches\nreadyz check passed\n"
                    .into()
            )
        );
        assert_eq!(get(&health, "/readyz/db", ""), (200, "ok".into()));
        let withheld = "[-]search failed: reason withheld\n";
        assert_eq!(get(&health, "/readyz/search", ""), (503, withheld.into()));
        assert_eq!(get(&health, "/readyz/missing", "").0, 404);
    }

    #[test]
    fn query_above_the_maximum_is_ignored() {
        let health = Health::new();
        let search = health.reporter("search").unwrap();
        search.fail();
        let many = "a=b&".repeat(MAX_PARAMETERS) + "exclude=search";
        assert_eq!(get(&health, "/readyz", &many).0, 503);
        let long = "exclude=search&".to_owned() + &"x".repeat(MAX_QUERY_LENGTH);
        assert_eq!(get(&health, "/readyz", &long).0, 503);
    }

    proptest! {
        #[test]
        fn fuzz_never_panics_and_never_echoes(
            path in "/(livez|readyz|healthz)?.{0,80}",
            query in "((verbose|exclude|.{0,9})=?(db|.{0,70})&?){0,70}",
            accept in "(application/(health[+])?json|[*]/[*]|.{0,9})([,;].{0,20}){0,9}",
        ) {
            let responder = HealthRoutes { health: Health::new(), with_reasons: true };
            let _db = responder.health.reporter("db").unwrap();
            let mut headers = HeaderMap::new();
            if let Ok(accept) = HeaderValue::from_str(&accept) {
                headers.insert(header::ACCEPT, accept);
            }
            if let Some(route) = HealthRoute::of(&path) {
                let response = responder.respond_to(route, Some(&query), &headers);
                prop_assert!(response.body().bytes().len() < 200);
            }
        }
    }
}
