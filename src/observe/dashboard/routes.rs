//! The paths of the page.

use std::{
    fmt,
    hash::{BuildHasher, RandomState},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Response, StatusCode, header, request::Parts};

use super::{
    access::{Access, is_of_another_site, percent_decode},
    feed::Feed,
    stream::{EventStream, OpenStream},
};
use crate::{
    endpoint::{EndpointBody, Serve, not_allowed, plain, typed},
    event::{event, prose},
    observe::{decision::DecisionReporter, visit::ForceCircuit},
    outcome::LayerKind,
    sealed::Sealed,
};

const ROOT: &str = "/buttress";
const PAGE: &str = include_str!("page.html");
/// The text in [`PAGE`] that is replaced by the nonce.
const NONCE: &str = "{nonce}";
/// The time after which a client tries a declined stream again, in seconds.
const RETRY_STREAM: &str = "15";

/// The paths of a live page. The endpoints of [`DashboardLayer`](super::DashboardLayer) and
/// [`DashboardService`](super::DashboardService).
#[derive(Clone)]
pub struct DashboardRoutes {
    feed: Arc<Feed>,
    access: Arc<Access>,
    nonces: Arc<Nonces>,
}

/// A path that the page serves.
enum Route<'a> {
    /// `/buttress`, which redirects to the page, so that the relative paths in the page are right.
    Root,
    Page,
    Status,
    Events,
    /// The encoded name of a circuit, and the change.
    Control(&'a str, ForceCircuit),
}

impl<'a> Route<'a> {
    fn of(path: &'a str) -> Option<Self> {
        let path = path.strip_prefix(ROOT)?;
        Some(match path {
            "" => Self::Root,
            "/" => Self::Page,
            "/status.json" => Self::Status,
            "/events" => Self::Events,
            _ => {
                let (name, action) = path.strip_prefix("/circuits/")?.rsplit_once('/')?;
                let change = match action {
                    "open" => ForceCircuit::Open,
                    "close" => ForceCircuit::Closed,
                    "reset" => ForceCircuit::Reset,
                    _ => return None,
                };
                Self::Control(name, change)
            }
        })
    }
}

impl DashboardRoutes {
    pub(super) fn new(feed: Arc<Feed>, access: Access) -> Self {
        Self { feed, access: Arc::new(access), nonces: Arc::default() }
    }

    fn respond_to(&self, request: &Parts) -> Response<EndpointBody> {
        if let Err(declined) = self.access.check(request) {
            return *declined;
        }
        let Some(route) = Route::of(request.uri.path()) else {
            return plain(StatusCode::NOT_FOUND, "not found\n");
        };
        let is_read = request.method == Method::GET || request.method == Method::HEAD;
        match route {
            Route::Control(..) if self.access.controls.is_none() => not_allowed(""),
            Route::Control(name, change) if request.method == Method::POST => {
                self.control(request, name, change)
            }
            Route::Control(..) => not_allowed("POST"),
            _ if !is_read => not_allowed("GET, HEAD"),
            Route::Root => {
                let mut response = plain(StatusCode::PERMANENT_REDIRECT, "see buttress/\n");
                // Relative, so that it is right behind a proxy that removes a prefix of the path.
                let location = HeaderValue::from_static("buttress/");
                response.headers_mut().insert(header::LOCATION, location);
                response
            }
            Route::Page => self.page(),
            Route::Status => typed("application/json", StatusCode::OK, self.feed.document().into()),
            Route::Events => self.events(request),
        }
    }

    fn page(&self) -> Response<EndpointBody> {
        let nonce = self.nonces.next();
        let body = PAGE.replace(NONCE, &nonce);
        let mut response = typed("text/html; charset=utf-8", StatusCode::OK, body.into());
        let policy = format!(
            "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; \
             base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        );
        if let Ok(policy) = HeaderValue::from_maybe_shared(Bytes::from(policy)) {
            response.headers_mut().insert(header::CONTENT_SECURITY_POLICY, policy);
        }
        response
    }

    fn events(&self, request: &Parts) -> Response<EndpointBody> {
        if is_of_another_site(request) {
            return plain(StatusCode::FORBIDDEN, "this request comes from another site\n");
        }
        let Some(open) = OpenStream::open(&self.feed.registry) else {
            let mut response =
                plain(StatusCode::SERVICE_UNAVAILABLE, "no stream is free; read status.json\n");
            let retry = HeaderValue::from_static(RETRY_STREAM);
            response.headers_mut().insert(header::RETRY_AFTER, retry);
            return response;
        };
        let last_event_id = request
            .headers
            .get("last-event-id")
            .and_then(|id| id.to_str().ok()?.parse().ok())
            .filter(|id| *id < u64::MAX);
        let stream = EventStream::new(&self.feed, open, last_event_id);
        let mut response = typed("text/event-stream", StatusCode::OK, Bytes::new());
        *response.body_mut() = EndpointBody::stream(Box::new(stream));
        let headers = response.headers_mut();
        headers.remove(header::CONTENT_LENGTH);
        // nginx would buffer the stream.
        let no = HeaderValue::from_static("no");
        headers.insert(HeaderName::from_static("x-accel-buffering"), no);
        response
    }

    fn control(&self, request: &Parts, name: &str, change: ForceCircuit) -> Response<EndpointBody> {
        let Some(name) = percent_decode(name.as_bytes()) else {
            return plain(StatusCode::NOT_FOUND, "not found\n");
        };
        let sender = match self.access.check_control(request, &name) {
            Ok(sender) => sender,
            Err(declined) => return *declined,
        };
        if !self.feed.registry.force(&name, change) {
            return plain(StatusCode::NOT_FOUND, "no circuit with this name is watched\n");
        }
        let (state, action) = match change {
            ForceCircuit::Open => ("forced_open", "forced open"),
            ForceCircuit::Closed => ("forced_closed", "forced closed"),
            ForceCircuit::Reset => ("closed", "reset"),
        };
        let layer = LayerKind::CircuitBreaker.as_str();
        let why = format!("{action} on the live page, by {sender}");
        let log = &self.feed.registry.layers().log;
        let reporter =
            DecisionReporter { log: Arc::downgrade(log), layer, name: Some(Arc::from(&*name)) };
        // Before the event, because a panic of the subscriber must not withhold the decision.
        log.add(reporter.decision("control used", None, why, 1));
        event!(
            breaker,
            WARN,
            layer,
            &*name,
            state = state,
            sender = prose(&sender),
            "control used"
        );
        plain(StatusCode::OK, "done\n")
    }
}

impl Sealed for DashboardRoutes {}

impl Serve for DashboardRoutes {
    #[inline]
    fn serves(&self, path: &str) -> bool {
        path.strip_prefix(ROOT).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }

    fn accepts(&self, _: &Method) -> bool {
        true
    }

    fn respond(&self, request: &Parts) -> Response<EndpointBody> {
        let mut response = self.respond_to(request);
        let headers = response.headers_mut();
        let mut insert = |name, value| {
            headers.entry(name).or_insert(HeaderValue::from_static(value));
        };
        insert(header::CONTENT_SECURITY_POLICY, "default-src 'none'; frame-ancestors 'none'");
        insert(header::REFERRER_POLICY, "no-referrer");
        insert(HeaderName::from_static("cross-origin-resource-policy"), "same-origin");
        response
    }
}

impl fmt::Debug for DashboardRoutes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DashboardRoutes").field("access", &self.access).finish_non_exhaustive()
    }
}

/// Makes nonces for the content security policy: 128 bits that a reader of earlier nonces cannot predict.
///
/// `fastrand` is not used, because its next values can be computed from a few of its values. `RandomState` has keys from
/// the random source of the system, and its hash function, SipHash, was designed as a pseudorandom function: without the
/// keys, the hash of the next number is unknown.
#[derive(Debug, Default)]
struct Nonces {
    keys: RandomState,
    count: AtomicU64,
}

impl Nonces {
    fn next(&self) -> String {
        let count = self.count.fetch_add(1, Ordering::Relaxed);
        format!("{:016x}{:016x}", self.keys.hash_one((count, 0)), self.keys.hash_one((count, 1)))
    }
}

#[cfg(all(test, not(buttress_loom)))]
mod tests {
    use super::*;

    #[test]
    fn page_is_small_and_writes_texts_only() {
        assert!(PAGE.len() <= 40 * 1024, "{} bytes", PAGE.len());
        assert_eq!(PAGE.matches(NONCE).count(), 2);
        for forbidden in [
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "Function(",
            "http://",
            "https://",
            "url(",
            "<img",
            "@import",
            " onclick",
            " style=",
        ] {
            // The namespace of SVG is a name and not an address.
            let page = PAGE.replace("'http://www.w3.org/2000/svg'", "");
            assert!(!page.contains(forbidden), "{forbidden}");
        }
    }

    #[test]
    fn nonces_differ() {
        let (some, others) = (Nonces::default(), Nonces::default());
        let mut nonces: Vec<String> = (0..100).flat_map(|_| [some.next(), others.next()]).collect();
        assert!(nonces.iter().all(|nonce| nonce.len() == 32));
        nonces.sort();
        nonces.dedup();
        assert_eq!(nonces.len(), 200);
    }
}
