use std::{fmt, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};

use crate::{
    drain::drain_request,
    error::BoxError,
    outcome::{Rejected, RejectedKind, TimeoutPhase, grpc, retry_after},
    permit::FromBytes,
    sealed::Sealed,
};

/// Converts a rejection into an error or a response.
///
/// [`AsError`] is the default of every layer. [`Respond`] and [`RespondWith`] respond.
///
/// The trait is sealed: it cannot be implemented outside of this crate.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot convert a rejection into a result of this service (response `{Res}`, error `{E}`)",
    label = "no conversion of a rejection",
    note = "`.respond()` needs requests of `http::Request<_>` and responses of `http::Response<TrackedBody<B>>` with `B::Data: From<Bytes>`: do not change the protocol of the layer from `Http`",
    note = "for other types, use `.respond_with(|rejected: &Rejected| ..)`, or remove it: then a rejection is a `BoxError`, and the error of the wrapped service must be `Into<BoxError>`"
)]
pub trait Reject<Req, Res, E>: Sealed + Clone + Send + Sync + 'static {
    /// The error of the layer: the error of the inner service, or a box with that error or the rejection.
    type Error;

    /// Whether a rejection becomes a response. `false`: it becomes an error.
    const RESPONDS: bool = true;

    /// Returns the form that a rejection of this request has.
    fn form(&self, request: &Req) -> ResponseFormat;

    /// Converts the rejection.
    fn reject(self, form: ResponseFormat, rejected: Rejected) -> Result<Res, Self::Error>;

    /// Takes over the request that is rejected. A strategy that responds drains its body, so that the response reaches
    /// a client that still sends the request.
    #[inline]
    fn discard(&self, request: Req, rejected: Rejected) -> Rejected {
        drop(request);
        rejected
    }

    /// Converts an error of the inner service.
    fn error(error: E) -> Self::Error;

    /// Returns whether the error carries a rejection of an inner layer, which reaches the caller as it is.
    fn is_rejection(error: &Self::Error) -> bool {
        let _ = error;
        false
    }
}

/// The form of a rejection, recorded from the request before the inner service consumes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResponseFormat {
    /// An HTTP status and headers, without a body.
    Empty,
    /// An HTTP status, headers, and a problem document.
    Json,
    /// A trailers-only gRPC response.
    Grpc,
    /// A trailers-only gRPC-Web response. Its clients require the content type of gRPC-Web.
    GrpcWeb,
}

impl ResponseFormat {
    pub(crate) const fn is_grpc(self) -> bool {
        matches!(self, Self::Grpc | Self::GrpcWeb)
    }

    pub(crate) fn of(method: &Method, headers: &HeaderMap) -> Self {
        if grpc::is_grpc_call(method, headers) {
            if grpc::is_grpc_web(headers) { Self::GrpcWeb } else { Self::Grpc }
        } else if method != Method::HEAD && accepts_json(headers) {
            // A response to `HEAD` must not have a body: it would be an error of the HTTP/2 stream.
            Self::Json
        } else {
            Self::Empty
        }
    }
}

/// Returns whether `Accept` permits a problem document (RFC 9457). Without the header it is permitted.
fn accepts_json(headers: &HeaderMap) -> bool {
    accepts(headers, &["*/*", "application/*", "application/json", "application/problem+json"])
        .unwrap_or(true)
}

/// Returns whether `Accept` contains one of these media ranges without `q=0`. `None` if there is no `Accept`.
///
/// At most 8 headers and 32 ranges in each are read.
pub(crate) fn accepts(headers: &HeaderMap, ranges: &[&str]) -> Option<bool> {
    let mut permits = None;
    for value in headers.get_all(header::ACCEPT).iter().take(8) {
        permits = Some(false);
        let Ok(value) = value.to_str() else { continue };
        for range in value.split(',').take(32) {
            let mut parts = range.split(';').map(str::trim);
            let media = parts.next().unwrap_or_default();
            let is_listed = ranges.iter().any(|range| media.eq_ignore_ascii_case(range));
            let is_excluded = parts.any(|part| {
                part.strip_prefix("q=").is_some_and(|q| q.parse::<f32>().is_ok_and(|q| q <= 0.0))
            });
            if is_listed && !is_excluded {
                return Some(true);
            }
        }
    }
    permits
}

// ===== As an error =====

/// Rejects with a boxed error, for clients. [`Rejected::find`] distinguishes it from other errors.
#[derive(Clone, Copy, Debug, Default)]
pub struct AsError;

impl Sealed for AsError {}

impl<Req, Res, E: Into<BoxError>> Reject<Req, Res, E> for AsError {
    type Error = BoxError;

    const RESPONDS: bool = false;

    #[inline]
    fn form(&self, _: &Req) -> ResponseFormat {
        ResponseFormat::Empty
    }

    fn reject(self, _: ResponseFormat, rejected: Rejected) -> Result<Res, BoxError> {
        Err(Box::new(rejected))
    }

    #[inline]
    fn error(error: E) -> BoxError {
        error.into()
    }

    fn is_rejection(error: &BoxError) -> bool {
        Rejected::find(&**error).is_some()
    }
}

// ===== As a response =====

/// Rejects with a response and leaves the error type unchanged: for servers, and for tonic's clients.
///
/// The response to an HTTP request is a 503. It is a 429 for [`RejectedKind::Quota`], and a 504 for
/// [`RejectedKind::DeadlinePassed`] and for a client's [`RejectedKind::TimedOut`]. Its body is a problem document (RFC
/// 9457) if the client accepts `application/problem+json`; a response to `HEAD` has no body. The response to a gRPC
/// request (a `POST` with the content type) is a trailers-only `UNAVAILABLE`, `RESOURCE_EXHAUSTED` or
/// `DEADLINE_EXCEEDED` with `grpc-retry-pushback-ms`, at least 10. Every response carries `Cache-Control: no-store`, so
/// that no cache serves it to other clients, and the [`Rejected`] in its extensions.
///
/// Every 503 and 429 carries `Retry-After` in whole seconds, at least 1. It is 1 if no time is known: for a server's
/// timeout, a circuit that is held open, a misconfigured layer, and a [`Rejected::new`] without a time. A 504 carries
/// it only if a time is known. The 503 of a failed health check is not a rejection and carries none.
///
/// [`Rejected::respond_to`] returns the same response for a middleware of your own.
///
/// # Browsers
///
/// A browser closes an `EventSource` permanently after a 503, and a script of a WebSocket receives neither the status
/// nor the reason of a failed handshake. A middleware outside of the layers that reject can use
/// [`Rejected::into_event_stream`] and [`Rejected::websocket_close`], after which both can connect again:
///
/// ```
/// use axum::{
///     Router,
///     extract::{FromRequestParts, Request, ws::{CloseFrame, Message, WebSocketUpgrade}},
///     middleware::{Next, from_fn},
///     response::Response,
///     routing::get,
/// };
/// use buttress::{ConcurrencyLimitLayer, Rejected};
///
/// async fn for_browsers(request: Request, next: Next) -> Response {
///     let accept = request.headers().get("accept").cloned();
///     let (parts, body) = request.into_parts();
///     // Extracted from a clone, because the handler extracts it, too.
///     let upgrade = WebSocketUpgrade::from_request_parts(&mut parts.clone(), &()).await;
///     let response = next.run(Request::from_parts(parts, body)).await;
///     let Some(rejected) = response.extensions().get::<Rejected>().cloned() else { return response };
///     if let Ok(upgrade) = upgrade {
///         return upgrade.on_upgrade(async move |mut socket| {
///             let (code, reason) = rejected.websocket_close();
///             let close = CloseFrame { code, reason: reason.into() };
///             let _ = socket.send(Message::Close(Some(close))).await;
///         });
///     }
///     match accept {
///         Some(accept) if accept == "text/event-stream" => rejected.into_event_stream(),
///         _ => response,
///     }
/// }
///
/// let app: Router = Router::new()
///     .route("/events", get(|| async { "…" }))
///     .layer(ConcurrencyLimitLayer::new(512).respond())
///     .layer(from_fn(for_browsers));
/// # let _ = app;
/// ```
///
/// Such a response has the status 200 or 101, so layers and metrics outside of the middleware count a success.
///
/// # Uploads
///
/// A client that is still sending its request would lose a response after which the server closes the connection: it
/// receives a TCP reset (RFC 9112 §9.6), or `RST_STREAM` over HTTP/2, which some clients report as an error. The
/// rejection is therefore sent at once, while a task that the layer spawns reads and discards the rest of the request
/// body. That drain ends with the body, after 16 MiB, or after one second, whichever is first; then the body is
/// dropped. It holds no permit. At most 1024 drains run at once in the process, so that rejected uploads occupy a
/// bounded number of connections; above that, and outside of a Tokio runtime, the body is dropped. A request without a
/// body, or whose body has been read, costs nothing.
///
/// The bodies that are drained are those of servers: hyper's `Incoming` (feature `hyper`), axum's (feature `axum`) and
/// tonic's (feature `tonic`). Layers that time out drain axum's and tonic's only. Bodies of other
/// types are dropped. After `Expect: 100-continue` a body is drained only if it has been polled, because the first poll
/// would invite the client to send it (RFC 9110 §10.1.1). [`RespondWith`] and
/// [`RespondLayer`](super::layer::RespondLayer) drain in the same way. Around a client, a rejected request with a body
/// of axum's type is drained too; the stream of a tonic client is not, as long as its URI has no authority.
#[derive(Clone, Copy, Debug, Default)]
pub struct Respond;

impl Sealed for Respond {}

impl<ReqB: 'static, B: FromBytes, E> Reject<Request<ReqB>, Response<B>, E> for Respond {
    type Error = E;

    #[inline]
    fn form(&self, request: &Request<ReqB>) -> ResponseFormat {
        ResponseFormat::of(request.method(), request.headers())
    }

    fn reject(self, form: ResponseFormat, rejected: Rejected) -> Result<Response<B>, E> {
        Ok(response(form, rejected).map(B::from_bytes))
    }

    fn discard(&self, request: Request<ReqB>, rejected: Rejected) -> Rejected {
        if drain_request(request) { rejected.draining() } else { rejected }
    }

    #[inline]
    fn error(error: E) -> E {
        error
    }
}

/// Returns the response of [`Respond`].
pub(crate) fn response(form: ResponseFormat, rejected: Rejected) -> Response<Bytes> {
    let mut body = Bytes::new();
    let mut headers = HeaderMap::with_capacity(5);
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    let status = match form {
        ResponseFormat::Grpc | ResponseFormat::GrpcWeb => {
            let web = form == ResponseFormat::GrpcWeb;
            let content = if web { "application/grpc-web" } else { "application/grpc" };
            let code = grpc::of_rejected(rejected.kind());
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content));
            headers.insert(grpc::STATUS, HeaderValue::from(code));
            headers
                .insert(grpc::MESSAGE, HeaderValue::from_static(rejected.kind().public_reason()));
            if let Some(after) = rejected.retry_after() {
                headers.insert(retry_after::PUSHBACK, HeaderValue::from(pushback_millis(after)));
            }
            StatusCode::OK
        }
        ResponseFormat::Json | ResponseFormat::Empty => {
            let status = match rejected.kind() {
                RejectedKind::Quota => StatusCode::TOO_MANY_REQUESTS,
                // A deadline that has passed is a 504 on a server, too: the caller does not wait any more.
                RejectedKind::TimedOut(phase)
                    if rejected.is_by_server() && phase != TimeoutPhase::Deadline =>
                {
                    StatusCode::SERVICE_UNAVAILABLE
                }
                RejectedKind::DeadlinePassed | RejectedKind::TimedOut(_) => {
                    StatusCode::GATEWAY_TIMEOUT
                }
                _ => StatusCode::SERVICE_UNAVAILABLE,
            };
            // Every 503 and 429 carries the header. Without a known time its value is the minimum.
            let is_temporary =
                matches!(status, StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS);
            let after = is_temporary.then_some(Duration::ZERO);
            if let Some(after) = rejected.retry_after().or(after) {
                headers.insert(header::RETRY_AFTER, HeaderValue::from(whole_seconds(after)));
            }
            if form == ResponseFormat::Json {
                headers.insert(
                    header::CONTENT_TYPE,
                    HeaderValue::from_static("application/problem+json"),
                );
                body = problem(status, rejected.kind());
            }
            status
        }
    };
    let mut response = Response::new(body);
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response.extensions_mut().insert(rejected);
    response
}

impl Rejected {
    /// Converts the rejection into the response that [`Respond`] gives to this request, for a middleware or handler of
    /// your own.
    ///
    /// The request decides the form: gRPC, a problem document, or no body. The rest of its body is
    /// [drained](Respond#uploads), so that the response reaches a client that is still sending it. For a request whose
    /// body has been read, pass a request with the same method and headers and the body `()`.
    ///
    /// ```
    /// use axum::{Router, extract::Request, middleware::{Next, from_fn}, response::Response, routing::get};
    /// use buttress::{outcome::RejectedKind, Rejected};
    /// use std::time::Duration;
    ///
    /// async fn quota(request: Request, next: Next) -> Response {
    ///     if request.headers().contains_key("x-over-quota") {
    ///         // 429 with `Retry-After: 30`; for gRPC `RESOURCE_EXHAUSTED` with a pushback of 30 s.
    ///         let rejected = Rejected::new(RejectedKind::Quota).with_retry_after(Duration::from_secs(30));
    ///         return rejected.respond_to(request);
    ///     }
    ///     next.run(request).await
    /// }
    ///
    /// let app: Router = Router::new().route("/", get(|| async { "hello" })).layer(from_fn(quota));
    /// # let _ = app;
    /// ```
    #[must_use]
    pub fn respond_to<ReqB: 'static, B: From<Bytes>>(self, request: Request<ReqB>) -> Response<B> {
        let form = ResponseFormat::of(request.method(), request.headers());
        let rejected = if drain_request(request) { self.draining() } else { self };
        response(form, rejected).map(B::from)
    }

    /// Converts the rejection into a response after which a browser's `EventSource` connects again: a 200 with an event
    /// stream that consists of `retry:` and ends.
    ///
    /// The browser waits for the [time to retry](Self::retry_after), at least 1 s. After a 503 it would close the
    /// `EventSource` permanently (HTML standard, "Server-sent events"). The [`Rejected`] is in the extensions.
    #[must_use]
    pub fn into_event_stream<B: From<Bytes>>(self) -> Response<B> {
        let after = self.retry_after().unwrap_or_default().max(Duration::from_secs(1));
        let stream = format!("retry: {}\n\n", after.as_nanos().div_ceil(1_000_000));
        let mut response = Response::new(B::from(Bytes::from(stream)));
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        response.extensions_mut().insert(self);
        response
    }

    /// Returns the close code and the reason with which a server that has accepted a WebSocket reports the rejection:
    /// 1013, "Try Again Later" in IANA's registry of close codes, and the reason that a problem document would contain.
    ///
    /// Browsers expose both to scripts, and expose nothing of a handshake that failed with 503.
    #[must_use]
    pub const fn websocket_close(&self) -> (u16, &'static str) {
        (1013, self.kind().public_reason())
    }
}

/// Returns the response of [`Respond`] to a request without headers, so that a handler, an extractor or a middleware
/// can return `Result<_, Rejected>`. [`Rejected::respond_to`] also responds to gRPC requests and drains the request
/// body.
#[cfg(feature = "axum")]
#[cfg_attr(docsrs, doc(cfg(feature = "axum")))]
impl axum::response::IntoResponse for Rejected {
    fn into_response(self) -> axum::response::Response {
        response(ResponseFormat::Json, self).map(axum::body::Body::from)
    }
}

/// Returns a problem document (RFC 9457), which reveals no internal state. The time to retry is in the header.
fn problem(status: StatusCode, kind: RejectedKind) -> Bytes {
    Bytes::from(format!(
        r#"{{"type":"about:blank","title":"{}","status":{},"reason":"{}"}}"#,
        status.canonical_reason().unwrap_or_default(),
        status.as_u16(),
        kind.public_reason(),
    ))
}

/// The minimum pushback. grpcio clients hang at a pushback of 0.
const MIN_PUSHBACK_MS: u64 = 10;

/// Rounds up to whole milliseconds.
fn pushback_millis(after: Duration) -> u64 {
    let ms = after.as_nanos().div_ceil(1_000_000);
    u64::try_from(ms).unwrap_or(u64::MAX).max(MIN_PUSHBACK_MS)
}

/// Rounds up to whole seconds, at least 1: all clients that read `Retry-After: 0` would retry at once.
pub(crate) fn whole_seconds(after: Duration) -> u64 {
    (after.as_secs() + u64::from(after.subsec_nanos() > 0)).max(1)
}

/// Rejects with the result of a closure, for services of any types, or for a response of your own form. The body of a
/// rejected HTTP request is drained as with [`Respond`].
#[derive(Clone)]
pub struct RespondWith<F>(pub(crate) F);

impl<F> Sealed for RespondWith<F> {}

impl<F, Req, Res, E> Reject<Req, Res, E> for RespondWith<F>
where
    Req: 'static,
    F: Fn(&Rejected) -> Result<Res, E> + Clone + Send + Sync + 'static,
{
    type Error = E;

    #[inline]
    fn form(&self, _: &Req) -> ResponseFormat {
        ResponseFormat::Empty
    }

    fn reject(self, _: ResponseFormat, rejected: Rejected) -> Result<Res, E> {
        self.0(&rejected)
    }

    fn discard(&self, request: Req, rejected: Rejected) -> Rejected {
        if drain_request(request) { rejected.draining() } else { rejected }
    }

    #[inline]
    fn error(error: E) -> E {
        error
    }
}

impl<F> fmt::Debug for RespondWith<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RespondWith")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn accept(value: &str) -> bool {
        let mut headers = HeaderMap::new();
        headers.insert(header::ACCEPT, HeaderValue::from_bytes(value.as_bytes()).unwrap());
        accepts_json(&headers)
    }

    #[test]
    fn problem_document_requires_a_permitting_accept_header() {
        assert!(accepts_json(&HeaderMap::new()));
        assert!(accept("*/*"));
        assert!(accept("text/html, application/json;q=0.5"));
        assert!(accept("Application/Problem+JSON"));
        assert!(!accept("text/html"));
        assert!(!accept("application/json;q=0"));
        assert!(!accept("\u{fffd}"));
    }

    #[test]
    fn format_follows_the_request() {
        let of = |method: Method, content: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content));
            ResponseFormat::of(&method, &headers)
        };
        assert_eq!(of(Method::POST, "application/grpc+proto"), ResponseFormat::Grpc);
        assert_eq!(of(Method::POST, "application/grpc-web-text"), ResponseFormat::GrpcWeb);
        assert_eq!(of(Method::POST, "Application/gRPC;charset=utf-8"), ResponseFormat::Grpc);
        assert_eq!(of(Method::POST, "APPLICATION/GRPC-WEB+proto"), ResponseFormat::GrpcWeb);
        assert_eq!(of(Method::POST, "application/grpcfoo"), ResponseFormat::Json);
        assert_eq!(of(Method::POST, "application/grpc-webfoo"), ResponseFormat::Json);
        assert_eq!(of(Method::POST, "application/json"), ResponseFormat::Json);
        assert_eq!(of(Method::HEAD, "application/json"), ResponseFormat::Empty);
        // Only a POST is a gRPC request (gRPC over HTTP/2, "Call-Definition").
        assert_eq!(of(Method::GET, "application/grpc"), ResponseFormat::Json);
        assert_eq!(of(Method::HEAD, "application/grpc"), ResponseFormat::Empty);
    }

    #[test]
    fn response_forbids_caching() {
        for form in [
            ResponseFormat::Empty,
            ResponseFormat::Json,
            ResponseFormat::Grpc,
            ResponseFormat::GrpcWeb,
        ] {
            for kind in [RejectedKind::Full, RejectedKind::TimedOut(TimeoutPhase::Head)] {
                let response = response(form, Rejected::new(kind));
                assert_eq!(response.headers()["cache-control"], "no-store", "{form:?} {kind:?}");
            }
        }
    }

    #[test]
    fn every_503_and_429_carries_retry_after() {
        let phases = TimeoutPhase::ALL.into_iter().map(RejectedKind::TimedOut);
        let kinds = [
            RejectedKind::Open,
            RejectedKind::Probing,
            RejectedKind::Recovering,
            RejectedKind::ForcedOpen,
            RejectedKind::Full,
            RejectedKind::Outranked,
            RejectedKind::WaitedTooLong,
            RejectedKind::DeadlinePassed,
            RejectedKind::Saturated,
            RejectedKind::Unhealthy,
            RejectedKind::Quota,
            RejectedKind::ShuttingDown,
            RejectedKind::Misconfigured,
        ];
        for kind in kinds.into_iter().chain(phases) {
            let by =
                [Rejected::new(kind), Rejected::by(crate::outcome::LayerKind::ServerTimeout, kind)];
            for (rejected, form) in
                by.into_iter().zip([ResponseFormat::Json, ResponseFormat::Empty])
            {
                let response = response(form, rejected);
                let after = response.headers().get(header::RETRY_AFTER);
                let is_temporary = matches!(response.status().as_u16(), 503 | 429);
                assert_eq!(
                    after.map(|after| after == "1"),
                    is_temporary.then_some(true),
                    "{kind:?}"
                );
            }
        }
    }

    #[test]
    fn pushback_is_rounded_up_and_at_least_10_ms() {
        assert_eq!(pushback_millis(Duration::ZERO), 10);
        assert_eq!(pushback_millis(Duration::from_micros(20_001)), 21);
        assert_eq!(pushback_millis(Duration::MAX), u64::MAX);
    }

    #[test]
    fn response_hides_internal_reasons() {
        for kind in [RejectedKind::Misconfigured, RejectedKind::ForcedOpen] {
            let grpc = response(ResponseFormat::Grpc, Rejected::new(kind));
            assert_eq!(grpc.headers()["grpc-message"], "unavailable");
            let http = response(ResponseFormat::Json, Rejected::new(kind));
            assert!(http.body().ends_with(br#""reason":"unavailable"}"#));
        }
    }

    #[test]
    fn retry_after_is_rounded_up_and_at_least_one() {
        assert_eq!(whole_seconds(Duration::ZERO), 1);
        assert_eq!(whole_seconds(Duration::from_millis(1001)), 2);
        assert_eq!(whole_seconds(Duration::from_secs(30)), 30);
    }

    #[test]
    fn quota_is_429_and_resource_exhausted() {
        let rejected =
            || Rejected::new(RejectedKind::Quota).with_retry_after(Duration::from_millis(1500));
        let http = response(ResponseFormat::Json, rejected());
        assert_eq!(http.status(), 429);
        assert_eq!(http.headers()["retry-after"], "2");
        assert_eq!(
            http.body(),
            r#"{"type":"about:blank","title":"Too Many Requests","status":429,"reason":"quota_exceeded"}"#
        );
        let grpc = response(ResponseFormat::Grpc, rejected());
        assert_eq!(grpc.headers()["grpc-status"], "8");
        assert_eq!(grpc.headers()["grpc-retry-pushback-ms"], "1500");
        assert_eq!(grpc.headers()["content-type"], "application/grpc");
        let web = response(ResponseFormat::GrpcWeb, rejected());
        assert_eq!(web.headers()["content-type"], "application/grpc-web");
        assert_eq!(web.headers()["grpc-status"], "8");
        let plain = response(ResponseFormat::Empty, Rejected::new(RejectedKind::Full));
        assert_eq!((plain.status().as_u16(), plain.body().len()), (503, 0));
        assert!(plain.extensions().get::<Rejected>().is_some());
    }

    proptest! {
        #[test]
        fn fuzz_response_has_the_format_of_its_request(
            accept in "(application/((problem[+])?json|[*])|[*]/[*]|.{0,9})(;q=[0-9.]{0,5}|[,;].{0,20}){0,9}",
            content in "(application/grpc)?(-web)?[+;.]?.{0,9}",
            method in prop::sample::select(vec![Method::GET, Method::POST, Method::HEAD, Method::CONNECT]),
            kind in prop::sample::select(vec![
                RejectedKind::Open, RejectedKind::Full, RejectedKind::Quota, RejectedKind::DeadlinePassed,
                RejectedKind::TimedOut(TimeoutPhase::Head), RejectedKind::TimedOut(TimeoutPhase::Deadline),
            ]),
            after in any::<Option<Duration>>(),
        ) {
            let mut headers = HeaderMap::new();
            for (name, text) in [(header::ACCEPT, accept), (header::CONTENT_TYPE, content)] {
                if let Ok(value) = HeaderValue::from_bytes(text.as_bytes()) {
                    headers.append(name, value);
                }
            }
            let form = ResponseFormat::of(&method, &headers);
            let rejected = Rejected::new(kind);
            let rejected = match after {
                Some(after) => rejected.with_retry_after(after),
                None => rejected,
            };
            let response = response(form, rejected);
            if form == ResponseFormat::Json {
                let problem: serde_json::Value = serde_json::from_slice(response.body()).unwrap();
                prop_assert_eq!(&problem["status"], response.status().as_u16());
                prop_assert_eq!(&problem["reason"], kind.as_str());
            } else {
                prop_assert!(response.body().is_empty());
            }
            if let Some(after) = response.headers().get(header::RETRY_AFTER) {
                prop_assert!(after.to_str().unwrap().parse::<u64>().unwrap() >= 1);
            }
            prop_assert_eq!(response.headers().contains_key("grpc-status"), matches!(form, ResponseFormat::Grpc | ResponseFormat::GrpcWeb));
        }
    }
}
