use std::{fmt, sync::Arc, time::Duration};

use tower_layer::Layer;

use super::{
    protocol::AsIs,
    service::Timeout,
    settings::{TimeoutHandle, TimeoutState, Timeouts},
};
use crate::{
    classify::{Http, PerResponse},
    error::ConfigError,
    fault::Fault,
    outcome::{LayerKind, Rejected},
    permit::SlotRef,
    respond::{AsError, Respond, RespondWith},
};

/// Ends calls that exceed the timeout of a phase: the response head, the first frame, pauses of a body, or the whole
/// call.
///
/// A layer, its clones and all services that it wraps share the same settings. A setter after the layer has built a
/// service returns a layer with state of its own, so the services that exist keep their settings: use the
/// [handle](TimeoutHandle) to change a running layer. See the [module](super).
#[must_use = "a layer does nothing until it wraps a service"]
#[derive(Clone)]
pub struct TimeoutLayer<M = Http, R = AsError> {
    state: Arc<TimeoutState>,
    slot: SlotRef<TimeoutState>,
    by: LayerKind,
    protocol: M,
    reject: R,
    fault: Fault,
}

impl TimeoutLayer {
    /// Creates a layer with these timeouts. A phase that they do not set has no timeout.
    pub fn new(timeouts: Timeouts) -> Self {
        Self::new_by(LayerKind::Timeout, timeouts)
    }

    /// Creates a layer whose rejections and metrics name this layer.
    pub(crate) fn new_by(by: LayerKind, timeouts: Timeouts) -> Self {
        let state = TimeoutState::new(by, timeouts);
        let slot = state.slot();
        let fault = timeouts.check().err().into();
        Self { state, slot, by, protocol: Http, reject: AsError, fault }
    }

    /// Creates a layer for a client, with the timeouts of [`Timeouts::http`].
    pub fn http() -> Self {
        Self::new(Timeouts::http())
    }
}

impl Default for TimeoutLayer {
    /// Returns the layer of [`http`](Self::http).
    fn default() -> Self {
        Self::http()
    }
}

impl TimeoutLayer<AsIs> {
    /// Creates a layer for a server, with the timeouts of [`Timeouts::server`].
    ///
    /// The type of the request body [stays the same](TimeoutLayer::as_is). With [`respond`](TimeoutLayer::respond), the
    /// response to a call that times out is 503. The timeout of the head begins when the request has been received, if
    /// its body is axum's or tonic's (features `axum`, `tonic`). For other bodies it begins with the call, so
    /// long uploads need a longer timeout.
    pub fn server() -> Self {
        TimeoutLayer::new_by(LayerKind::ServerTimeout, Timeouts::server()).as_is()
    }
}

impl<M, R> TimeoutLayer<M, R> {
    fn set(mut self, timeouts: Timeouts) -> Self {
        if self.fault.accept(timeouts.check()).is_some() {
            self = self.fork_if_used();
            self.state.set(timeouts);
        }
        self
    }

    /// Returns the layer itself, or, if it has built a service, a layer with the same settings and state of its own.
    pub(crate) fn fork_if_used(mut self) -> Self {
        if self.state.is_used() {
            self.state = self.state.fork();
            self.slot = self.state.slot();
        }
        self
    }

    /// Sets the timeout of the response head, from when the request has been sent, or `None`.
    ///
    /// [`TimeoutHandle::set_head`] changes it while the layer runs.
    pub fn head(self, time: impl Into<Option<Duration>>) -> Self {
        self.set(Timeouts::new().head(time))
    }

    /// Sets the timeout of the first frame of a response body, or `None`. Counts only while the body is polled.
    ///
    /// [`TimeoutHandle::set_first_frame`] changes it while the layer runs.
    pub fn first_frame(self, time: impl Into<Option<Duration>>) -> Self {
        self.set(Timeouts::new().first_frame(time))
    }

    /// Sets the timeout between two frames of a response body, or `None`. Counts only while the body is polled.
    ///
    /// [`TimeoutHandle::set_response_idle`] changes it while the layer runs.
    pub fn response_idle(self, time: impl Into<Option<Duration>>) -> Self {
        self.set(Timeouts::new().response_idle(time))
    }

    /// Sets the timeout of each frame of a request body, or `None`. Counts only while the body is polled, and until the
    /// response head.
    ///
    /// [`TimeoutHandle::set_request_idle`] changes it while the layer runs.
    pub fn request_idle(self, time: impl Into<Option<Duration>>) -> Self {
        self.set(Timeouts::new().request_idle(time))
    }

    /// Sets the time for which the wrapped service may leave a request body unpolled, until the response head, or
    /// `None`. If another task polls the body, the call may last up to twice as long.
    ///
    /// [`TimeoutHandle::set_request_stall`] changes it while the layer runs.
    pub fn request_stall(self, time: impl Into<Option<Duration>>) -> Self {
        self.set(Timeouts::new().request_stall(time))
    }

    /// Sets the minimum rate of a request body in bytes per second, or `None`. 240 on a server and off on a client by
    /// default; 1 or more.
    ///
    /// A body may keep its reader waiting for [`body_grace`](Self::body_grace) in total. Each byte adds the time that
    /// it takes at this rate. The allowance never exceeds the time of [`request_idle`](Self::request_idle) (60 s
    /// without one), so a body that has been fast may pause for that time. The defaults are those of Apache's
    /// `mod_reqtimeout` (`body=5,MinRate=240`) and Kestrel's `MinRequestBodyDataRate`.
    ///
    /// Time in which the service does not poll the body does not count. The rate is also enforced after the response
    /// head, for services that respond before they have read their request. A body below the rate fails with a boxed
    /// [`Rejected`]. If there is no response head yet, the call is rejected, as after the timeout of
    /// [`request_idle`](Self::request_idle).
    ///
    /// Tunnels (`CONNECT`) and gRPC requests over HTTP/2 are exempt. A client can claim to send gRPC: a service that
    /// reads bodies of any content type should also set [`min_body_rate_for_grpc`](Self::min_body_rate_for_grpc).
    /// Upgrades need no exemption: an upgraded connection is not a request body. With [`as_is`](Self::as_is), only
    /// axum's and tonic's bodies have a rate.
    ///
    /// [`TimeoutHandle::set_min_body_rate`] changes it while the layer runs.
    pub fn min_body_rate(self, bytes_per_second: impl Into<Option<u32>>) -> Self {
        self.set(Timeouts::new().min_body_rate(bytes_per_second))
    }

    /// Sets the time for which a request body may keep its reader waiting before the
    /// [minimum rate](Self::min_body_rate) counts: 5 s by default, above zero.
    ///
    /// [`TimeoutHandle::set_body_grace`] changes it while the layer runs.
    pub fn body_grace(self, time: Duration) -> Self {
        self.set(Timeouts::new().body_grace(time))
    }

    /// Sets whether gRPC requests have to keep the [minimum rate](Self::min_body_rate), too. Off by default, because a
    /// client stream may pause.
    ///
    /// [`TimeoutHandle::set_min_body_rate_for_grpc`] changes it while the layer runs.
    pub fn min_body_rate_for_grpc(self, on: bool) -> Self {
        self.set(Timeouts::new().min_body_rate_for_grpc(on))
    }

    /// Sets the timeout of the whole call, from its beginning to the end of its response body, or `None`. Off by
    /// default.
    ///
    /// In the [recommended position](super#in-the-stack), inside of the retry, it applies to **each attempt**: a call
    /// with three attempts may take three times as long, plus the delays between them. To bound the whole call, use the
    /// [default](crate::deadline::DeadlineLayer::default_of) of a [`DeadlineLayer`](crate::deadline::DeadlineLayer)
    /// outside of the retry.
    ///
    /// The total includes the time of a slow upload and of a slow reader of the response, and it cuts off healthy
    /// streams. [`response_total`](Self::response_total) does not include the upload.
    ///
    /// [`TimeoutHandle::set_total`] changes it while the layer runs.
    pub fn total(self, time: impl Into<Option<Duration>>) -> Self {
        self.set(Timeouts::new().total(time))
    }

    /// Sets the timeout of the whole response, or `None`: from when the request has been sent to the end of the
    /// response body. Off by default.
    ///
    /// Unlike [`total`](Self::total), it does not include the time of an upload. If the response begins while the
    /// request is still being sent, it begins at the end of the request. It includes the time for which the response
    /// waits for its reader. If the layer is inside of a retry, it applies to each attempt, as every timeout of this
    /// layer. It corresponds to linkerd's response timeout.
    ///
    /// If the request body is not watched ([`as_is`](Self::as_is) with a body of another type than axum's or tonic's,
    /// [`per_response`](Self::per_response)), it begins with the call, as [`head`](Self::head) does.
    ///
    /// [`TimeoutHandle::set_response_total`] changes it while the layer runs.
    pub fn response_total(self, time: impl Into<Option<Duration>>) -> Self {
        self.set(Timeouts::new().response_total(time))
    }

    /// Leaves the type of requests unchanged, for services that accept a single body type, such as axum's routes.
    ///
    /// A body of axum or tonic is nevertheless watched, with the feature `axum` or `tonic`. If
    /// [`request_stall`](Self::request_stall) is not set, it is equal to [`head`](Self::head) for such a body. Bodies
    /// of other types are not watched, and the timeout of the head begins with the call.
    pub fn as_is(self) -> TimeoutLayer<AsIs, R> {
        self.with_protocol(AsIs)
    }

    /// Accepts services with any types of requests and responses.
    ///
    /// The call ends with the response. Only [`head`](Self::head), [`total`](Self::total) and
    /// [`response_total`](Self::response_total) have an effect, and all three begin with the call. Extensions of
    /// requests are not read.
    pub fn per_response(self) -> TimeoutLayer<PerResponse, R> {
        self.with_protocol(PerResponse)
    }

    /// Responds to calls that time out, and leaves the error type of the service unchanged. See [`Respond`].
    pub fn respond(self) -> TimeoutLayer<M, Respond> {
        self.with_reject(Respond)
    }

    /// Responds to calls that time out with the result of a closure.
    pub fn respond_with<F, Res, E>(self, respond: F) -> TimeoutLayer<M, RespondWith<F>>
    where
        F: Fn(&Rejected) -> Result<Res, E> + Clone + Send + Sync + 'static,
    {
        self.with_reject(RespondWith(respond))
    }

    /// Sets the name of the layer in errors and events. Only the first call has an effect.
    pub fn name(mut self, name: &str) -> Self {
        self = self.fork_if_used();
        self.state.name(name);
        self
    }

    /// Returns the handle of the layer, which reads its state and changes its timeouts.
    #[must_use]
    pub fn handle(&self) -> TimeoutHandle {
        TimeoutHandle(self.state.clone())
    }

    /// Returns the layer, or the error of its first invalid setting. A layer with an invalid setting that is used
    /// nevertheless rejects every call.
    ///
    /// # Errors
    ///
    /// The [`ConfigError`] names the field, the value and the remedy.
    pub fn checked(mut self) -> Result<Self, ConfigError> {
        self.fault.take().map_or(Ok(self), Err)
    }

    fn with_protocol<N>(self, protocol: N) -> TimeoutLayer<N, R> {
        let Self { state, slot, by, reject, fault, .. } = self;
        TimeoutLayer { state, slot, by, protocol, reject, fault }
    }

    fn with_reject<N>(self, reject: N) -> TimeoutLayer<M, N> {
        let Self { state, slot, by, protocol, fault, .. } = self;
        TimeoutLayer { state, slot, by, protocol, reject, fault }
    }
}

impl<S, M: Clone, R: Clone> Layer<S> for TimeoutLayer<M, R> {
    type Service = Timeout<S, M, R>;

    fn layer(&self, inner: S) -> Self::Service {
        self.state.set_used();
        let fault = self.fault.label().cloned();
        let with = (self.protocol.clone(), self.reject.clone());
        Timeout::new(inner, self.state.clone(), self.slot, self.by, with, fault)
    }
}

impl<M, R> fmt::Debug for TimeoutLayer<M, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TimeoutLayer")
            .field("timeouts", &*self.state)
            .field("fault", &self.fault)
            .finish_non_exhaustive()
    }
}
