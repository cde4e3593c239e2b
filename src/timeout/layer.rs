use std::{fmt, sync::Arc, time::Duration};

use tower_layer::Layer;

use super::{
    exchange::AsIs,
    service::Timeout,
    settings::{State, TimeoutHandle, Timeouts},
};
use crate::{
    ConfigError,
    call::{AsError, Far, Http, LayerKind, PerResponse, Rejected, Respond, RespondWith},
    error::Fault,
};

/// Ends calls that take too long, phase by phase: the head, the first frame, silences, all of it.
///
/// Its times belong to one layer and all its clones, however often the layer is applied. See the
/// [module](crate::timeout).
#[must_use = "a layer does nothing until it wraps a service"]
#[derive(Clone)]
pub struct TimeoutLayer<M = Http, R = AsError> {
    state: Arc<State>,
    far: Far<State>,
    by: LayerKind,
    protocol: M,
    reject: R,
    fault: Fault,
}

impl TimeoutLayer {
    /// With these times; what they do not say is off.
    pub fn new(timeouts: Timeouts) -> Self {
        let state = State::new(timeouts);
        let (far, by) = (state.far(), LayerKind::Timeout);
        let fault = timeouts.check().err().into();
        Self { state, far, by, protocol: Http, reject: AsError, fault }
    }

    /// A client's times: [`Timeouts::http`].
    pub fn http() -> Self {
        Self::new(Timeouts::http())
    }
}

impl TimeoutLayer<AsIs> {
    /// A server's times: [`Timeouts::server`]. Requests are handed on [as they are](TimeoutLayer::as_is), and
    /// calls that take too long are answered with 503. The head's time begins when the request is here, if its body
    /// is axum's or tonic's (features `axum`, `tonic-health`); else with the call, so that long uploads need a
    /// longer one.
    pub fn server() -> Self {
        TimeoutLayer::new(Timeouts::server()).as_is().by(LayerKind::ServerTimeout)
    }
}

impl<M, R> TimeoutLayer<M, R> {
    fn set(mut self, timeouts: Timeouts) -> Self {
        match timeouts.check() {
            Ok(()) => self.state.set(timeouts),
            Err(error) => {
                self.fault.get_or_insert(error);
            }
        }
        self
    }

    /// How long the response head may take from when the request has been sent, or `None`.
    pub fn head(self, time: impl Into<Option<Duration>>) -> Self {
        self.set(Timeouts::new().head(time))
    }

    /// How long the first frame of a response body may take, while it is asked for, or `None`.
    pub fn first_frame(self, time: impl Into<Option<Duration>>) -> Self {
        self.set(Timeouts::new().first_frame(time))
    }

    /// How long a response body may be silent between two frames, while it is asked for one, or `None`.
    pub fn idle(self, time: impl Into<Option<Duration>>) -> Self {
        self.set(Timeouts::new().idle(time))
    }

    /// How long a request body may be silent while it is asked for a frame, up to the response head; or `None`.
    pub fn sending(self, time: impl Into<Option<Duration>>) -> Self {
        self.set(Timeouts::new().sending(time))
    }

    /// How long the wrapped service may take no more of a request body, up to the response head; or `None`.
    pub fn taking(self, time: impl Into<Option<Duration>>) -> Self {
        self.set(Timeouts::new().taking(time))
    }

    /// Sets the minimum rate of a request body in bytes per second, or `None`. 240 on a server and off on a client by
    /// default; 1 or more.
    ///
    /// A body may keep its reader waiting for [`body_grace`](Self::body_grace) in all. Each byte adds the time that it
    /// takes at this rate, up to the time for [`sending`](Self::sending) (60 s without one): a body that was fast so
    /// far may be silent for that long, but its allowance does not grow beyond it. The defaults are those of Apache's
    /// `mod_reqtimeout` (`body=5,MinRate=240`) and Kestrel's `MinRequestBodyDataRate`.
    ///
    /// Time in which the service does not poll the body does not count. The rate is also enforced after the response
    /// head, for services that respond before they have read their request. A body below the rate fails with a boxed
    /// [`Rejected`], and a call without a response head is rejected like one whose body was silent.
    ///
    /// Tunnels (`CONNECT`) and gRPC requests over HTTP/2 are exempt. A client can claim to send gRPC: a service that
    /// reads bodies of any content type should also set [`min_body_rate_for_grpc`](Self::min_body_rate_for_grpc).
    /// Upgrades need no exemption: an upgraded connection is not a request body. With [`as_is`](Self::as_is), only
    /// axum's and tonic's bodies have a rate.
    pub fn min_body_rate(self, bytes_per_second: impl Into<Option<u32>>) -> Self {
        self.set(Timeouts::new().min_body_rate(bytes_per_second))
    }

    /// Sets the time for which a request body may keep its reader waiting before the
    /// [minimum rate](Self::min_body_rate) counts: 5 s by default, above zero.
    pub fn body_grace(self, time: Duration) -> Self {
        self.set(Timeouts::new().body_grace(time))
    }

    /// Sets whether gRPC requests have to keep the [minimum rate](Self::min_body_rate), too. Off by default, because a
    /// client stream may be silent.
    pub fn min_body_rate_for_grpc(self, on: bool) -> Self {
        self.set(Timeouts::new().min_body_rate_for_grpc(on))
    }

    /// Sets the timeout of the whole call, from its beginning to the end of its response body, or `None`. Off by
    /// default.
    ///
    /// In the [recommended position](crate::timeout#in-the-stack), inside of the retry, it applies to **each attempt**:
    /// a call with three attempts may take three times as long, plus the delays between them. To bound the whole call,
    /// use the [default](crate::DeadlineLayer::default_of) of a [`DeadlineLayer`](crate::DeadlineLayer) outside of the
    /// retry.
    ///
    /// It counts a slow upload and a slow reader of the response, and cuts healthy streams.
    /// [`response_total`](Self::response_total) does not count the upload.
    pub fn total(self, time: impl Into<Option<Duration>>) -> Self {
        self.set(Timeouts::new().total(time))
    }

    /// Sets the timeout of the whole response, or `None`: from when the request has been sent to the end of the
    /// response body. Off by default.
    ///
    /// Unlike [`total`](Self::total), it does not count the time of an upload. If the response begins while the request
    /// is still being sent, it counts from the end of the request. It counts the time for which the response waits for
    /// its reader. If the layer is inside of a retry, it applies to each attempt, as every timeout of this layer. It
    /// corresponds to linkerd's response timeout.
    ///
    /// If the request body is not watched ([`as_is`](Self::as_is) with a body of another type than axum's or tonic's,
    /// [`per_response`](Self::per_response)), it counts from the call, as [`head`](Self::head) does.
    pub fn response_total(self, time: impl Into<Option<Duration>>) -> Self {
        self.set(Timeouts::new().response_total(time))
    }

    /// Hands requests on as they are: for services that take one body type only, such as axum's routes.
    ///
    /// A body that is axum's or tonic's is watched all the same, with the feature `axum` or `tonic-health`, and where
    /// nothing more of it is taken that may last for as long as [`head`](Self::head). Others are not, and the head's
    /// time begins with the call.
    pub fn as_is(self) -> TimeoutLayer<AsIs, R> {
        self.with_protocol(AsIs)
    }

    /// For services of any types: the response is the whole of it, and [`head`](Self::head) and
    /// [`total`](Self::total) are what there is. Nothing is looked for in requests.
    pub fn per_response(self) -> TimeoutLayer<PerResponse, R> {
        self.with_protocol(PerResponse)
    }

    /// Answers calls that take too long with a response, and leaves the service's error type alone. See
    /// [`Respond`].
    pub fn respond(self) -> TimeoutLayer<M, Respond> {
        self.with_reject(Respond)
    }

    /// Answers them with what a closure makes.
    pub fn respond_with<F, Res, E>(self, answer: F) -> TimeoutLayer<M, RespondWith<F>>
    where
        F: Fn(&Rejected) -> Result<Res, E> + Clone + Send + Sync + 'static,
    {
        self.with_reject(RespondWith(answer))
    }

    /// A name for errors and events. The first one given stays.
    pub fn name(self, name: &str) -> Self {
        self.state.name(name);
        self
    }

    /// Looks at the layer and changes its times.
    #[must_use]
    pub fn handle(&self) -> TimeoutHandle {
        TimeoutHandle(self.state.clone())
    }

    /// The layer, or the first of its settings that cannot work.
    ///
    /// # Errors
    ///
    /// The [`ConfigError`] names the field, the value and the remedy.
    pub fn checked(mut self) -> Result<Self, ConfigError> {
        self.fault.take().map_or(Ok(self), Err)
    }

    /// The same times for a server.
    #[cfg(feature = "stack")]
    pub(crate) fn for_server(self) -> TimeoutLayer<AsIs, R> {
        self.as_is().by(LayerKind::ServerTimeout)
    }

    /// Speaks for another layer.
    pub(crate) fn by(mut self, by: LayerKind) -> Self {
        self.by = by;
        self
    }

    fn with_protocol<N>(self, protocol: N) -> TimeoutLayer<N, R> {
        let Self { state, far, by, reject, fault, .. } = self;
        TimeoutLayer { state, far, by, protocol, reject, fault }
    }

    fn with_reject<N>(self, reject: N) -> TimeoutLayer<M, N> {
        let Self { state, far, by, protocol, fault, .. } = self;
        TimeoutLayer { state, far, by, protocol, reject, fault }
    }
}

impl<S, M: Clone, R: Clone> Layer<S> for TimeoutLayer<M, R> {
    type Service = Timeout<S, M, R>;

    fn layer(&self, inner: S) -> Self::Service {
        let fault = self.fault.label().cloned();
        let with = (self.protocol.clone(), self.reject.clone());
        Timeout::new(inner, self.state.clone(), self.far, self.by, with, fault)
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
