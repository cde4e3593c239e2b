//! A circuit breaker: rejects calls while the upstream keeps failing, and probes it before it admits calls again.
//!
//! ```
//! # use std::time::Duration;
//! # fn client() -> impl Clone { () }
//! use buttress::CircuitBreakerLayer;
//! use tower::ServiceBuilder;
//!
//! let breaker = CircuitBreakerLayer::http();      // 5 failures in a row, open for 30 s, 1 probe
//! let handle = breaker.handle();
//! let client = ServiceBuilder::new().layer(breaker).service(client());
//! println!("{:?}", handle.snapshot());
//! ```
//!
//! With more settings:
//!
//! ```
//! # fn main() -> Result<(), buttress::ConfigError> {
//! use std::time::Duration;
//! use buttress::{CircuitBreakerLayer, Trip, breaker::OpenDuration};
//!
//! let secs = Duration::from_secs;
//! let breaker = CircuitBreakerLayer::new(Trip::any([
//!     Trip::consecutive(5),
//!     Trip::failure_ratio(0.5).within(secs(10)).min_calls(20),
//!     Trip::slow_ratio(0.8, secs(2)).over(100),
//! ]))
//! .name("search")
//! .open_for(OpenDuration::backoff(secs(1), secs(60)).follow_retry_after(secs(300)))
//! .half_open_of(2, 3)
//! .probe_timeout(secs(10))
//! .ramp(secs(30))
//! .respond()
//! .checked()?;
//! # let _ = breaker; Ok(()) }
//! ```
//!
//! # States
//!
//! ```text
//!            a rule trips              the open time has passed
//!  closed ───────────────▶ open ───────────────────────────▶ half-open
//!    ▲                      ▲      too many probes failed        │
//!    │                      └────────────────────────────────────┤
//!    └──────────────────────── enough probes succeeded ──────────┘
//! ```
//!
//! | a call ends as | closed | half-open |
//! |---|---|---|
//! | success | counted; ends a run of failures | one probe passed |
//! | success, but slow | counted, also as slow | one probe failed |
//! | failure | counted | one probe failed |
//! | throttled (429, 529, `RESOURCE_EXHAUSTED`) | not counted | one probe failed |
//! | cancelled, or rejected by an inner layer | not counted | releases its slot |
//! | cancelled, after the upstream had the request for the time of a slow-call rule | counted as slow | one probe failed |
//! | cancelled, after the upstream had the request for [`count_cancelled_after`](CircuitBreakerLayer::count_cancelled_after) | counted as a failure | one probe failed |
//! | [connection housekeeping](#connection-housekeeping) | not counted | releases its slot |
//!
//! The table of [`Http`](crate::classify::Http) maps responses to outcomes. The table of
//! [`outcome`](crate::outcome#which-side-caused-it) states which side caused a failure. All layers share both tables.
//!
//! Thresholds are inclusive, and so are the ends of open times and timeouts. An outcome that belongs to an earlier
//! state changes nothing: a call that was admitted before the trip can neither close the circuit nor open it again.
//! Changes by time alone (the end of an open time or of a timeout) take effect at that time, even if no call arrives.
//!
//! # Rules
//!
//! | rule | opens the circuit when | evaluates |
//! |---|---|---|
//! | [`consecutive`](Trip::consecutive) | a number of calls in a row failed | the run of failures |
//! | [`failure_ratio`](Trip::failure_ratio) | a share of the calls failed | a window of [time](Trip::within) or of [calls](Trip::over) |
//! | [`slow_ratio`](Trip::slow_ratio) | a share of the calls were slow | the same |
//! | [`when`](Trip::when) | a closure returns `true` | the [counts](CallStats) of all other rules |
//! | [`any`](Trip::any) | any of several rules trips | |
//!
//! A window of calls stores one bit per call. A window of time has ten counters and slides by a tenth of its duration.
//! The cost of a call does not depend on the number of calls in the windows. With a window of time each good call reads
//! the clock, or one in 16 with a [coarse clock](Trip::coarse_clock). Rules are evaluated when a call fails or is slow:
//! a success that is not slow never opens a circuit. The counts start again when the circuit closes, and when the
//! handle forces any state except half-open.
//!
//! # Connection housekeeping
//!
//! Servers and proxies close connections as a matter of routine, and a request that is on its way at that moment is
//! lost. This carries no information about the health of the upstream. Such an outcome [is
//! housekeeping](crate::outcome::Outcome::is_housekeeping):
//!
//! | cause | counts as |
//! |---|---|
//! | the client never sent the request | housekeeping |
//! | HTTP/2 `REFUSED_STREAM` | housekeeping |
//! | `GOAWAY` with `NO_ERROR` and a last stream below the request's | housekeeping |
//! | `GOAWAY` with an error code and a last stream below the request's | a failure |
//! | a stream reset with any other code | a failure |
//! | a connection that had delivered a response breaks before the next one | housekeeping |
//! | a new connection breaks before the request is sent, or before its first response | a failure |
//! | a connection breaks after the response head | a failure |
//! | no connection: refused, timed out, TLS handshake failed; network or host unreachable | a failure |
//!
//! Two causes count as a connection that breaks before the response, because the transport does not distinguish them:
//!
//! - A `GOAWAY` with any code and a last stream that is not below the request's, if the connection then ends. h2
//!   reports only the end of the connection.
//! - An HTTP/1 connection that ends within the response head. hyper reports the same error as before the first byte.
//!
//! Not every transport reveals whether a connection was reused:
//!
//! | transport | a connection that breaks before the response |
//! |---|---|
//! | [`connect::Client`](crate::connect::Client) | is known to be reused or new |
//! | hyper-util's client, reqwest, tonic | is assumed to be reused, unless its HTTP/2 handshake failed (hyper-util) |
//! | any other service that fails with an `io::Error` | is assumed to be new |
//!
//! tonic's `Channel` right under the layer needs the feature `tonic`: without it, its error type is opaque and each
//! error is a failure.
//!
//! An upstream that accepts and closes every connection opens the circuit nevertheless. Housekeeping counts as a
//! failure, and keeps its [`Reason`](crate::outcome::Reason), in two cases, also for half-open probes:
//!
//! - The circuit has not recorded a response since it was made, and the request was not sent or its connection broke.
//!   No connection can have been reused by then. A connection that is known to be reused is exempt.
//! - Housekeeping has outnumbered responses by more than 100, for at least 1 s. Each reused connection has delivered a
//!   response, so this does not happen as long as the upstream works. The count rises by 1 with each housekeeping
//!   outcome and falls by 1 with each response. It restarts at 0 after 10 s without housekeeping.
//!
//! # Open time
//!
//! | [`OpenDuration`] | rejects calls for |
//! |---|---|
//! | a `Duration`, or [`fixed`](OpenDuration::fixed) | the same time at each trip |
//! | [`backoff`](OpenDuration::backoff) | twice as long with each trip, with jitter, up to a maximum; the base again [after a time without trips](OpenDuration::reset_after) |
//! | [`follow_retry_after`](OpenDuration::follow_retry_after) | at least the `Retry-After` or gRPC pushback of the upstream, up to a bound |
//!
//! # Half-open
//!
//! [`half_open_of(m, n)`](CircuitBreakerLayer::half_open_of) admits `n` probes in total. The circuit closes at the m-th
//! success, and opens as soon as m successes are impossible. A probe has a
//! [timeout](CircuitBreakerLayer::probe_timeout). When it expires, the probe has passed if its response head was a
//! success and not slow. It has failed if the head was bad, or if the probe still waits for it from the upstream.
//! Therefore neither a stream of hours nor a hung call keeps a circuit half-open.
//!
//! The timeout starts when the request has been sent, as far as a [`SentMark`](crate::outcome::SentMark) or a timeout
//! layer inside of the breaker reveals it. A probe that waits for its caller (to send more of the request or to read
//! the response) releases its slot after 100 ms, so that slow callers do not keep other calls from probing. Its outcome
//! still counts. If its response head was good, it passes at that time. A probe that still waits inside the client (for
//! a permit or a connection) when its timeout expires releases its slot without a result.
//!
//! | callers beyond the probes | |
//! |---|---|
//! | by default | are rejected |
//! | [`half_open_queue`](CircuitBreakerLayer::half_open_queue) | wait, up to a number of callers and a time |
//! | [`external_probes`](CircuitBreakerLayer::external_probes) | are all rejected: outcomes given to [`record`](CircuitBreakerHandle::record) decide |
//!
//! The [snapshot](CircuitBreakerSnapshot::half_open) contains the numbers of probes that passed and failed, the number
//! of successes that close the circuit, and the total number of probes. The events "circuit closed" and "circuit opened"
//! have the fields `passed`, `failed` and `probes` (the total) if probes decided. An episode begins with a trip and ends
//! when the circuit is closed. Its first opening is a WARN event, and later ones are INFO events.
//!
//! After closing, a [ramp](CircuitBreakerLayer::ramp) admits a tenth of the calls at first, and a growing share of them
//! over its duration. The other calls are rejected as [`Recovering`](crate::outcome::RejectedKind::Recovering).
//!
//! # Keys
//!
//! ```
//! # fn client() -> impl Clone { () }
//! use buttress::CircuitBreakerLayer;
//! use tower::Layer;
//!
//! let breakers = CircuitBreakerLayer::http().per_origin();    // one for each scheme, host and port
//! let handle = breakers.handle();
//! let client = breakers.layer(client());
//! for (origin, circuit) in handle.all() {
//!     println!("{origin}: {:?}", circuit.state());
//! }
//! ```
//!
//! Rejections and events name the origin. [`keyed`](CircuitBreakerLayer::keyed) takes any key of the request; its
//! circuits have the name of the layer.
//!
//! Requests choose the keys, so the map is bounded by the [number](KeyedCircuitBreakerLayer::max_keys) and by the
//! [size](KeyedCircuitBreakerLayer::max_key_bytes) of the keys. A new key in a full map replaces the least recently
//! used circuit that is like new:
//!
//! | a circuit is | like new |
//! |---|---|
//! | closed, and has counted nothing | at once, or when its trips are forgotten ([`reset_after`](OpenDuration::reset_after)) or its ramp has ended |
//! | closed, and has counted calls | in addition after its quiet period: no call was counted for 60 s, or for its longest [time window](Trip::within) if that is longer |
//! | open | never |
//! | half-open | after it received no call for as long as it was open |
//! | forced, isolated, or changed by its handle | never |
//! | used by a call, or referred to by a handle | never |
//!
//! If several circuits were last used between the same two new keys, any of them may be evicted first. Beyond 1024
//! circuits, the circuit to evict is the least recently used of about 1024. If no circuit is like new, the new key has
//! no circuit: its calls are made as if there were no breaker, and the [snapshot](KeyedCircuitBreakerHandle::snapshot)
//! counts them. An event reports this at most once in 10 s. Therefore no set of keys, old or invented, keeps new keys
//! out for longer than an open time and a quiet period after their last call, and no sequence of keys evicts an open
//! circuit.
//!
//! A circuit with a window of calls needs one bit per call of the window in addition to about 1 KiB.
//!
//! # Manual control
//!
//! | the [handle](CircuitBreakerHandle) | |
//! |---|---|
//! | [`force_open`](CircuitBreakerHandle::force_open) [`force_closed`](CircuitBreakerHandle::force_closed) [`half_open`](CircuitBreakerHandle::half_open) [`reset`](CircuitBreakerHandle::reset) | set the state |
//! | [`isolate`](CircuitBreakerHandle::isolate) | holds the circuit open as long as a guard exists, in any state |
//! | [`set_shadow`](CircuitBreakerHandle::set_shadow) | rejects no calls, and counts those that it would reject; the states change as usual |
//! | [`set_trip`](CircuitBreakerHandle::set_trip) [`set_open_for`](CircuitBreakerHandle::set_open_for) and the other setters | change the settings; the counts stay |
//! | [`snapshot`](CircuitBreakerHandle::snapshot) [`restore`](CircuitBreakerHandle::restore) | transfer the state to another circuit |
//! | [`changed`](CircuitBreakerHandle::changed) | waits for the next change of the state, also by time alone |
//!
//! A change of the reported state emits one event. Forcing a state that the circuit already has emits none, and neither
//! does a change of the state beneath an isolation.
//!
//! # In the stack
//!
//! In a client, the breaker is inside of the retry layer and outside of the concurrency limit. A rejection by the limit
//! is no failure of the upstream, and is not counted. While the circuit is open, the layer neither polls nor calls the
//! wrapped service. A circuit that opens wakes the callers that wait for that service, and rejects them.
//!
//! # Balancers
//!
//! With [`backpressure`](CircuitBreakerLayer::backpressure) a circuit is not ready while it would reject a call, and
//! `tower::balance::p2c` uses another endpoint. After the trip only probes reach an endpoint that is down. The layer
//! releases the reservation of the wrapped service, and wakes the balancer when the open time has passed, also without
//! traffic. On a ramp it is ready for a growing share of the time. A balancer polls `poll_ready` again before each
//! call, so only with backpressure may a ready service become not ready before `call`. The example `breaker_balance`
//! shows a balancer.
//!
//! rustc rejects the type of such a balancer in a task or in a handler:
//! [`BoxError`](crate::error::BoxError#tasks-and-handlers) states the remedies.
//!
//! # Streams
//!
//! A bad response head counts at once. After a good head the call ends with its body. A body that breaks off is a
//! failure, and so is a gRPC stream whose trailers state one. A response with a good head whose body is dropped unread
//! is a success. A gRPC stream that is dropped before its status is cancelled, unless its HTTP status is an error. The
//! duration of a call ends at the response head.
//!
//! # Cancellation
//!
//! A call that is dropped before its response head is not counted, and a probe releases its slot. This holds for a
//! caller that hangs up and for a [`Deadline`](crate::time::Deadline) of the caller. There is one exception, so that a
//! hung upstream opens the circuit although every caller ends its call early: the call is a failure if the upstream had
//! the complete request for [`count_cancelled_after`](CircuitBreakerLayer::count_cancelled_after). A timeout of a layer
//! of this crate and a deadline that the application sets are failures in any case.
//!
//! A call that panics is a failure. A caller that waits for a verdict leaves the queue when its future is dropped.
//!
//! # Defaults
//!
//! | setting | default |
//! |---|---|
//! | rule | 5 failures in a row |
//! | [`open_for`](CircuitBreakerLayer::open_for) | 30 s, fixed |
//! | [`OpenDuration::backoff`] | × 2, up to a tenth of jitter, the base again after 60 s |
//! | [`half_open`](CircuitBreakerLayer::half_open) | 1 probe |
//! | [`probe_timeout`](CircuitBreakerLayer::probe_timeout) | 30 s |
//! | [`count_cancelled_after`](CircuitBreakerLayer::count_cancelled_after) | 1 s; 10 s with the preset `slow`, 60 s with `llm` |
//! | [`half_open_queue`](CircuitBreakerLayer::half_open_queue) | off: callers are rejected |
//! | [`ramp`](CircuitBreakerLayer::ramp) | none |
//! | a ratio's window | 10 s, at least 20 calls |
//! | [`max_keys`](KeyedCircuitBreakerLayer::max_keys) | 1024 |
//! | [`max_key_bytes`](KeyedCircuitBreakerLayer::max_key_bytes) | 1024 |
//! | rejected calls | an error ([`Rejected`](crate::outcome::Rejected), boxed) |

mod circuit;
mod events;
mod handle;
mod key_map;
mod keyed;
mod layer;
mod machine;
#[cfg(feature = "observe")]
mod observe;
mod open_duration;
mod policy;
mod published;
#[cfg(test)]
mod slot_tests;
mod state;
mod sync_machine;
mod trip;

pub use self::{
    handle::{CircuitBreakerHandle, CircuitBreakerSnapshot, Isolation},
    keyed::{
        KeyExtractor, KeyedCircuitBreaker, KeyedCircuitBreakerFuture, KeyedCircuitBreakerHandle,
        KeyedCircuitBreakerLayer, KeyedCircuitBreakerSnapshot, PerOrigin,
    },
    layer::{CircuitBreaker, CircuitBreakerFuture, CircuitBreakerLayer},
    open_duration::OpenDuration,
    state::{CircuitState, HalfOpenProgress},
    trip::{CallStats, Trip, TripReason},
};
pub use crate::origin::Origin;
