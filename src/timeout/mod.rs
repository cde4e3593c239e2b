//! Timeouts for the phases of a call. A call that makes no progress is ended; a healthy stream is not.
//!
//! ```
//! # fn client() -> impl Clone { () }
//! use buttress::TimeoutLayer;
//! use tower::ServiceBuilder;
//!
//! // Response head 30 s; first frame of the response 60 s; gaps between the frames of a response or request 60 s;
//! // a request body that is no longer polled 5 minutes; no total.
//! let client = ServiceBuilder::new().layer(TimeoutLayer::http()).service(client());
//! ```
//!
//! For an upstream that is slow to begin its response and then streams it, and for a single call:
//!
//! ```
//! # fn main() -> Result<(), buttress::ConfigError> {
//! use std::time::Duration;
//! use buttress::{TimeoutLayer, Timeouts};
//!
//! let secs = Duration::from_secs;
//! let layer = TimeoutLayer::http().head(secs(60)).first_frame(secs(180)).response_idle(secs(30)).checked()?;
//!
//! let mut request = http::Request::new(());
//! request.extensions_mut().insert(Timeouts::new().head(secs(5)).total(secs(10)));
//! # let _ = layer; Ok(()) }
//! ```
//!
//! On a server, under axum:
//!
//! ```
//! use axum::{Router, routing::get};
//! use buttress::TimeoutLayer;
//!
//! // 503 for a call without a response head 30 s after its request, and for a request body that pauses for 60 s or is
//! // slower than 240 bytes per second. Response streams may pause.
//! let app: Router =
//!     Router::new().route("/", get(|| async { "…" })).layer(TimeoutLayer::server().respond());
//! ```
//!
//! # How it decides
//!
//! | phase | runs from | to |
//! |---|---|---|
//! | [`request_idle`](TimeoutLayer::request_idle) | a poll of the request body that is pending | the next frame; not used after the response head |
//! | [`request_stall`](TimeoutLayer::request_stall) | the call, or a poll that returned a frame of the request body | the next poll of the body, or the response head; if another task polls the body, the time can be twice as long |
//! | [`head`](TimeoutLayer::head) | the request has been sent | the response head |
//! | [`first_frame`](TimeoutLayer::first_frame) | the first poll of the response body that is pending | the first frame |
//! | [`response_idle`](TimeoutLayer::response_idle) | the same for each later frame | the next frame, or the end of the body |
//! | [`total`](TimeoutLayer::total) | the call | the end of the response body |
//! | [`response_total`](TimeoutLayer::response_total) | the request has been sent | the end of the response body |
//! | [`min_body_rate`](TimeoutLayer::min_body_rate) | a poll of the request body that is pending | the next frame; also after the response head |
//! | [`Deadline`](crate::time::Deadline) of the request | none: it is a point in time | the end of the response body |
//!
//! A body stalls if it has no frame while its consumer polls it. A client that reads a response slowly does not poll,
//! so only a total or a response total covers it. A concurrency limit with
//! [`max_unread`](https://docs.rs/buttress/latest/buttress/struct.ConcurrencyLimitLayer.html#method.max_unread) bounds
//! the time for which such a response holds a permit.
//!
//! An upstream that reads a request body slowly is not timed out. An upstream that reads nothing for the time of
//! [`request_stall`](TimeoutLayer::request_stall) is: its kernel still acknowledges TCP keepalives, so no other timeout
//! would end the call.
//!
//! # Slow request bodies
//!
//! A client that sends one byte every 50 s never exceeds the timeout for a pause, and would hold its call and the
//! permits of outer layers forever. On a server, a request body therefore has a
//! [minimum rate](TimeoutLayer::min_body_rate): 240 bytes per second, after 5 s. Its clock is paused while the service
//! does not poll the body. The rate is also enforced after the response head. gRPC over HTTP/2 is exempt. Turn the rate
//! off for a server that receives live streams.
//!
//! # When a request has been sent
//!
//! A request has been sent when the wrapped service has polled its body to the end, or has dropped the body. A frame of
//! `Bytes` that is longer than 64 KiB is passed on in pieces of that size. Otherwise a body of a single frame would
//! count as sent as soon as the transport had polled that frame.
//!
//! # Order of the checks
//!
//! The layer polls the wrapped service before the timer. A response that is available, or the last frame of a body, is
//! therefore never too late. A body that always has a further frame is nevertheless cut off at the total.
//!
//! A call whose deadline has passed before it begins is rejected. [`Timeouts`] in the extensions of a request replace
//! those of the layer, phase by phase.
//!
//! # Effect of a timeout
//!
//! | | before the head | in the body |
//! |---|---|---|
//! | a client | a boxed [`Rejected`](crate::outcome::Rejected) | the same, as the error of the body |
//! | a client with [`respond`](TimeoutLayer::respond) | 504; gRPC: `DEADLINE_EXCEEDED` | the same; gRPC: trailers of `DEADLINE_EXCEEDED` |
//! | a [`server`](TimeoutLayer::server) with [`respond`](TimeoutLayer::respond) | 503; gRPC: `DEADLINE_EXCEEDED` | the same |
//!
//! The layer never responds with 408, because browsers then send the same request again. An outer circuit breaker
//! counts a timeout as a failure. An outer retry layer retries a [`Timeout`](crate::outcome::Reason::Timeout) if that
//! is safe. A request body that stalls or is too slow is attributed to the caller, and so is a
//! [`Deadline`](crate::time::Deadline) of the caller: see the [table of causes](crate::outcome#which-side-caused-it).
//!
//! # Other clients' timeouts
//!
//! | other client | this crate |
//! |---|---|
//! | reqwest `timeout` | for the whole call the [default](crate::deadline::DeadlineLayer::default_of) of a [`DeadlineLayer`](crate::deadline::DeadlineLayer) outside of the retry, for each attempt [`total`](TimeoutLayer::total) |
//! | reqwest `RequestBuilder::timeout` | a [`Deadline`](crate::time::Deadline) in the extensions of the request, inside of such a layer |
//! | linkerd `timeout.linkerd.io/request`, Envoy `timeout` of a route | the [default](crate::deadline::DeadlineLayer::default_of) of a [`DeadlineLayer`](crate::deadline::DeadlineLayer); per attempt: [`total`](TimeoutLayer::total) |
//! | linkerd `timeout.linkerd.io/response` | [`response_total`](TimeoutLayer::response_total) |
//! | reqwest `read_timeout` | [`head`](TimeoutLayer::head), [`first_frame`](TimeoutLayer::first_frame) and [`response_idle`](TimeoutLayer::response_idle), all of that time |
//! | reqwest `connect_timeout`, httpx `connect` | the timeout of the connector, such as [`connect_timeout`](https://docs.rs/buttress/latest/buttress/connect/struct.ConnectLayer.html#method.connect_timeout); a call that gets no connection is ended by [`head`](TimeoutLayer::head), or by [`request_stall`](TimeoutLayer::request_stall) if it has a body |
//! | httpx `read` | [`head`](TimeoutLayer::head), [`first_frame`](TimeoutLayer::first_frame) and [`response_idle`](TimeoutLayer::response_idle) |
//! | httpx `write` | [`request_stall`](TimeoutLayer::request_stall); httpx has no timeout for a request body that stalls, which is [`request_idle`](TimeoutLayer::request_idle) |
//! | httpx `pool` | the maximum wait of [`ConnectLayer::queue`](https://docs.rs/buttress/latest/buttress/connect/struct.ConnectLayer.html#method.queue), or of [`ConcurrencyLimitLayer::queue`](https://docs.rs/buttress/latest/buttress/struct.ConcurrencyLimitLayer.html#method.queue) |
//! | tower `Timeout`, tower-http `TimeoutLayer` | [`head`](TimeoutLayer::head) |
//! | tower-http `ResponseBodyTimeoutLayer` | [`first_frame`](TimeoutLayer::first_frame) and [`response_idle`](TimeoutLayer::response_idle) |
//! | nginx `proxy_read_timeout` | [`head`](TimeoutLayer::head), [`first_frame`](TimeoutLayer::first_frame) and [`response_idle`](TimeoutLayer::response_idle) |
//! | nginx `proxy_send_timeout`, `client_body_timeout` | [`request_stall`](TimeoutLayer::request_stall), [`request_idle`](TimeoutLayer::request_idle) |
//! | Apache `mod_reqtimeout` `body=5,MinRate=240`, Kestrel `MinRequestBodyDataRate` | [`min_body_rate`](TimeoutLayer::min_body_rate) and [`body_grace`](TimeoutLayer::body_grace) |
//! | Envoy `stream_idle_timeout` | [`first_frame`](TimeoutLayer::first_frame), [`response_idle`](TimeoutLayer::response_idle), [`request_idle`](TimeoutLayer::request_idle) and [`request_stall`](TimeoutLayer::request_stall) |
//!
//! # In the stack
//!
//! On a client, put the layer innermost, around the client itself, so that the circuit breaker counts the timeouts. On
//! a server, put it inside of the concurrency limit.
//!
//! On a client, every timeout then applies to **one attempt**, including [`total`](TimeoutLayer::total) and
//! [`response_total`](TimeoutLayer::response_total): a call with three attempts and a total of 2 s may take 6 s, plus
//! the delays between the attempts. The layer times neither the wait for a permit nor the delay before an attempt. A
//! [`DeadlineLayer`](crate::deadline::DeadlineLayer) outside of the retry bounds the whole call.
//!
//! The wrapped service receives `http::Request<SendingBody<B>>`. A service with a single body type needs a
//! `tower_http::map_request_body::MapRequestBodyLayer` in between, or [`as_is`](TimeoutLayer::as_is). With `as_is`,
//! only the bodies of axum and tonic are watched (features `axum` and `tonic`). For other bodies, the timeout of
//! the head begins with the call. The layer does not time the readiness of the service.
//!
//! # Cancellation
//!
//! When a timeout expires, the layer drops the inner future or response body before it returns the rejection. This
//! releases the permits of inner layers, and the transport resets the stream or closes the connection.
//!
//! On a server, a client may still send its request when the timeout expires. With [`respond`](TimeoutLayer::respond)
//! the rest of an axum or tonic body is [drained](crate::respond::Respond#uploads), so that the response reaches the
//! client. A body that the service has moved to another task is drained when that task drops it.
//!
//! # Labels
//!
//! [`TimeoutPhase::as_str`] is the label of a phase in metrics, events and error texts. A
//! [`ConfigError`](crate::ConfigError) and the debug output of [`Timeouts`] name the setter instead. They differ for
//! these phases:
//!
//! | phase | label | setter |
//! |---|---|---|
//! | [`TimeoutPhase::Idle`] | `idle` | [`response_idle`](TimeoutLayer::response_idle) |
//! | [`TimeoutPhase::Sending`] | `sending` | [`request_idle`](TimeoutLayer::request_idle) |
//! | [`TimeoutPhase::Taking`] | `taking` | [`request_stall`](TimeoutLayer::request_stall) |
//! | [`TimeoutPhase::BodyRate`] | `body_rate` | [`min_body_rate`](TimeoutLayer::min_body_rate) |
//!
//! # Cost
//!
//! A response that is available at the first poll costs no timer, no reading of the clock, no allocation and no atomic
//! operation. A call that waits creates one timer. It creates none if an inner timeout, retry or deadline layer has set
//! a timer that is due no later, unless the future of that layer is in a box. A response body that is pending creates
//! another timer, in a box. A request with a body costs a small allocation, on a server two. With `respond` this also
//! applies if only a total or a deadline is set, because the body is drained after the timeout. With a total or a
//! deadline, each frame reads the clock.
//!
//! # Defaults
//!
//! | setting | [`http`](TimeoutLayer::http) | [`server`](TimeoutLayer::server) |
//! |---|---|---|
//! | [`head`](TimeoutLayer::head) | 30 s | 30 s |
//! | [`first_frame`](TimeoutLayer::first_frame) | 60 s | none |
//! | [`response_idle`](TimeoutLayer::response_idle) | 60 s, as nginx's `proxy_read_timeout` | none |
//! | [`request_idle`](TimeoutLayer::request_idle) | 60 s, as nginx's `client_body_timeout` | 60 s |
//! | [`request_stall`](TimeoutLayer::request_stall) | 5 minutes, as Envoy's `stream_idle_timeout` | the time of `head` |
//! | [`min_body_rate`](TimeoutLayer::min_body_rate) | none | 240 bytes per second, as Kestrel's `MinRequestBodyDataRate` |
//! | [`body_grace`](TimeoutLayer::body_grace) | 5 s | 5 s |
//! | [`total`](TimeoutLayer::total) | none | none |
//! | [`response_total`](TimeoutLayer::response_total) | none | none |
//!
//! # Comparison with tower and tower-http
//!
//! The timeout layers of tower and tower-http cover the response head only. tower-http's `TimeoutBody` does not forward
//! the size hint of its body. The service of tower-http polls its timer before the inner service, so it may discard a
//! response that is available. It responds with 408 by default.

mod body;
mod body_rate;
mod idle;
mod known_bodies;
mod layer;
#[cfg(feature = "observe")]
mod observe;
mod phase_times;
mod protocol;
mod service;
mod settings;
mod timers;
mod upload;

pub use self::{
    body::TimedBody,
    body_rate::BodyRate,
    layer::TimeoutLayer,
    protocol::{AsIs, TimeRequest, TimeResponse},
    service::{Timeout, TimeoutFuture},
    settings::{TimeoutHandle, TimeoutSnapshot, Timeouts},
    timers::CallTimers,
    upload::{SendingBody, Upload},
};
pub use crate::outcome::TimeoutPhase;
