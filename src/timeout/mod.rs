//! Timeouts in phases: a call that has fallen silent is ended, a healthy stream never.
//!
//! ```
//! # fn client() -> impl Clone { () }
//! use buttress::TimeoutLayer;
//! use tower::ServiceBuilder;
//!
//! // Head 30 s; first frame, silences of an answer or a request 60 s; a request of which nothing more is taken
//! // 5 minutes; no total.
//! let client = ServiceBuilder::new().layer(TimeoutLayer::http()).service(client());
//! ```
//!
//! For what thinks long and then streams, and for one call of it:
//!
//! ```
//! # fn main() -> Result<(), buttress::ConfigError> {
//! use std::time::Duration;
//! use buttress::{TimeoutLayer, Timeouts};
//!
//! let secs = Duration::from_secs;
//! let layer = TimeoutLayer::http().head(secs(60)).first_frame(secs(180)).idle(secs(30)).checked()?;
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
//! // 503 for a call without a response head 30 s after its request, and for a request that is silent for 60 s or slower
//! // than 240 bytes per second. Response streams may be silent.
//! let app: Router =
//!     Router::new().route("/", get(|| async { "…" })).layer(TimeoutLayer::server().respond());
//! ```
//!
//! # How it decides
//!
//! | phase | runs from | to |
//! |---|---|---|
//! | [`sending`](TimeoutLayer::sending) | the request body being asked for a frame, and having none | a frame; the response head ends it for good |
//! | [`taking`](TimeoutLayer::taking) | a frame of the request body being taken, and no other being asked for | one being asked for, or the response head; to twice that, where another task sends it |
//! | [`head`](TimeoutLayer::head) | the request body's end, or nobody wanting more of it | the response head |
//! | [`first_frame`](TimeoutLayer::first_frame) | the response body being asked for its first frame, and having none | that frame |
//! | [`idle`](TimeoutLayer::idle) | the same for each later frame | a frame, or the end |
//! | [`total`](TimeoutLayer::total) | the call | the end of the response body |
//! | [`response_total`](TimeoutLayer::response_total) | the request has been sent | the end of the response body |
//! | [`min_body_rate`](TimeoutLayer::min_body_rate) | the request body being polled, and having no frame | a frame; also after the response head |
//! | [`Deadline`](crate::Deadline) of the request | it is a time of day | the end of the response body |
//!
//! A stall is a producer that is silent while its consumer polls it. A client that reads a response slowly does not
//! poll, and only a total or a response total times it. A concurrency limit with
//! [`max_unread`](https://docs.rs/buttress/latest/buttress/struct.ConcurrencyLimitLayer.html#method.max_unread) bounds
//! the time for which it holds a permit. A slow reader on the server side is not timed out, but a reader that reads
//! nothing for the time of [`taking`](TimeoutLayer::taking) is: its kernel still acknowledges TCP's keepalives, and
//! nothing else would ever end the call.
//!
//! # Slow request bodies
//!
//! A client that sends one byte every 50 s is never silent for long, and would hold its call and the permits of outer
//! layers forever. On a server, a request body therefore has a
//! [minimum rate](TimeoutLayer::min_body_rate): 240 bytes per second, after 5 s. Its clock is paused while the service
//! does not poll the body. The rate is also enforced after the response head, and gRPC over HTTP/2 is exempt. Turn it
//! off for a server that receives live streams.
//!
//! # When a request has been sent
//!
//! A request is sent when the wrapped service has taken all of it. Long frames of `Bytes` are given to it in pieces
//! of 64 KiB, so that a body in one piece is not sent before it is.
//!
//! The wrapped service is polled first: an answer that is here is not too late, nor is a body's last frame. A body
//! that always has another frame is cut at the total all the same.
//!
//! A call whose deadline has passed is not begun. A request's own [`Timeouts`] go before the layer's, phase by
//! phase.
//!
//! # What comes of it
//!
//! | | before the head | in the body |
//! |---|---|---|
//! | a client | a [`Rejected`](crate::Rejected), boxed | the same, as the body's error |
//! | a client with [`respond`](TimeoutLayer::respond) | 504; gRPC: `DEADLINE_EXCEEDED` | the same; gRPC: trailers of `DEADLINE_EXCEEDED` |
//! | a [`server`](TimeoutLayer::server) with [`respond`](TimeoutLayer::respond) | 503; gRPC: `DEADLINE_EXCEEDED` | the same |
//!
//! The layer never responds with 408, because browsers then send the same request again. A circuit breaker outside of it
//! counts a timeout as a failure. A retry outside of it repeats a [`Timeout`](crate::call::Reason::Timeout) if that is
//! safe. A request body that stalls or is too slow is attributed to the caller, and so is a
//! [`Deadline`](crate::Deadline) of the caller: see the [table of causes](crate::call#which-side-caused-it).
//!
//! # Other clients' timeouts
//!
//! | theirs | here |
//! |---|---|
//! | reqwest `timeout` | the [default](crate::DeadlineLayer::default_of) of a [`DeadlineLayer`](crate::DeadlineLayer) outside of the retry for the whole call, [`total`](TimeoutLayer::total) for each attempt |
//! | reqwest `RequestBuilder::timeout` | a [`Deadline`](crate::Deadline) in the extensions of the request, under such a layer |
//! | linkerd `timeout.linkerd.io/request`, Envoy `timeout` of a route | the [default](crate::DeadlineLayer::default_of) of a [`DeadlineLayer`](crate::DeadlineLayer); per attempt: [`total`](TimeoutLayer::total) |
//! | linkerd `timeout.linkerd.io/response` | [`response_total`](TimeoutLayer::response_total) |
//! | reqwest `read_timeout` | [`head`](TimeoutLayer::head), [`first_frame`](TimeoutLayer::first_frame) and [`idle`](TimeoutLayer::idle) of that time |
//! | reqwest `connect_timeout`, httpx `connect` | the connector's, such as [`connect_timeout`](https://docs.rs/buttress/latest/buttress/connect/struct.ConnectLayer.html#method.connect_timeout); a call that gets no connection is ended by [`head`](TimeoutLayer::head), one with a body by [`taking`](TimeoutLayer::taking) |
//! | httpx `read` | [`head`](TimeoutLayer::head), [`first_frame`](TimeoutLayer::first_frame) and [`idle`](TimeoutLayer::idle) |
//! | httpx `write` | [`taking`](TimeoutLayer::taking); httpx does not time the caller's own part, which is [`sending`](TimeoutLayer::sending) |
//! | httpx `pool` | the wait of [`ConnectLayer::queue`](https://docs.rs/buttress/latest/buttress/connect/struct.ConnectLayer.html#method.queue), or of [`ConcurrencyLimitLayer::queue`](https://docs.rs/buttress/latest/buttress/struct.ConcurrencyLimitLayer.html#method.queue) |
//! | tower `Timeout`, tower-http `TimeoutLayer` | [`head`](TimeoutLayer::head) |
//! | tower-http `ResponseBodyTimeoutLayer` | [`first_frame`](TimeoutLayer::first_frame) and [`idle`](TimeoutLayer::idle) |
//! | nginx `proxy_read_timeout` | [`head`](TimeoutLayer::head), [`first_frame`](TimeoutLayer::first_frame) and [`idle`](TimeoutLayer::idle) |
//! | nginx `proxy_send_timeout`, `client_body_timeout` | [`taking`](TimeoutLayer::taking), [`sending`](TimeoutLayer::sending) |
//! | Apache `mod_reqtimeout` `body=5,MinRate=240`, Kestrel `MinRequestBodyDataRate` | [`min_body_rate`](TimeoutLayer::min_body_rate) and [`body_grace`](TimeoutLayer::body_grace) |
//! | Envoy `stream_idle_timeout` | [`first_frame`](TimeoutLayer::first_frame), [`idle`](TimeoutLayer::idle), [`sending`](TimeoutLayer::sending) and [`taking`](TimeoutLayer::taking) |
//!
//! # In the stack
//!
//! On a client, put the layer innermost, around the client itself, so that the circuit breaker counts the timeouts. On
//! a server, put it inside of the concurrency limit.
//!
//! On a client, every timeout is then that of **one attempt**, including [`total`](TimeoutLayer::total) and
//! [`response_total`](TimeoutLayer::response_total): a call with three attempts and a total of 2 s may take 6 s, plus
//! the delays between the attempts. The layer times neither the wait for a permit nor the delay before an attempt. A
//! [`DeadlineLayer`](crate::DeadlineLayer) outside of the retry bounds the whole call.
//!
//! The wrapped service receives `http::Request<SendingBody<B>>`. A service with a single body type needs a
//! `tower_http::map_request_body::MapRequestBodyLayer` in between, or [`as_is`](TimeoutLayer::as_is). With `as_is`,
//! only the bodies of axum and tonic are watched (features `axum` and `tonic-health`). For other bodies, the timeout of
//! the head begins with the call. The layer does not time the readiness of the service.
//!
//! # Cancellation
//!
//! What the call holds further in is dropped as its time is up, before the answer is given: permits are free, and
//! the connection is reset.
//!
//! On a server, a client may still send its request when the time is up. With [`respond`](TimeoutLayer::respond) the
//! rest of an axum or tonic body is [drained](crate::call::Respond#uploads), so that the response reaches the client. A
//! body that the service has moved to another task is drained when that task drops it.
//!
//! # Cost
//!
//! An answer that is ready costs no timer, no clock, no allocation and no atomic operation. A call that waits makes one
//! timer, or none, if a timeout, a retry or a deadline further in, no box in between, has set one that is due no later;
//! a body that makes its reader wait another, in a box. A request that has a body costs a small allocation, on a
//! server two (with `respond`, also if only a total or a deadline is set: the body has to be drained when it passes).
//! With a total, each frame reads the clock.
//!
//! # Defaults
//!
//! | setting | [`http`](TimeoutLayer::http) | [`server`](TimeoutLayer::server) |
//! |---|---|---|
//! | [`head`](TimeoutLayer::head) | 30 s | 30 s |
//! | [`first_frame`](TimeoutLayer::first_frame) | 60 s | none |
//! | [`idle`](TimeoutLayer::idle) | 60 s, as nginx's `proxy_read_timeout` | none |
//! | [`sending`](TimeoutLayer::sending) | 60 s, as nginx's `client_body_timeout` | 60 s |
//! | [`taking`](TimeoutLayer::taking) | 5 minutes, as Envoy's `stream_idle_timeout` | as head |
//! | [`min_body_rate`](TimeoutLayer::min_body_rate) | none | 240 bytes per second, as Kestrel's `MinRequestBodyDataRate` |
//! | [`body_grace`](TimeoutLayer::body_grace) | 5 s | 5 s |
//! | [`total`](TimeoutLayer::total) | none | none |
//! | [`response_total`](TimeoutLayer::response_total) | none | none |
//!
//! # Beside tower's and tower-http's
//!
//! Theirs time the response head only, or a body without its size; tower-http's answers before it looks whether
//! the response is there, and by default with 408.

mod body;
mod body_rate;
mod boxed;
mod exchange;
mod layer;
mod sending;
mod service;
mod settings;
mod stall;
mod watch;

pub use self::{
    body::TimedBody,
    exchange::AsIs,
    layer::TimeoutLayer,
    sending::SendingBody,
    service::{ResponseFuture, Timeout},
    settings::{TimeoutHandle, TimeoutSnapshot, Timeouts},
};
pub use crate::call::Phase;
