use std::{
    fmt,
    sync::{Arc, atomic::AtomicU64},
    task::{Context, Poll},
    time::Duration,
};

use http::{HeaderName, Request, Response};
use http_body::Body;
use tower_layer::Layer;
use tower_service::Service;

use super::{
    codec::{Codec, Millis},
    handle::{DeadlineHandle, DeadlineTimes, set},
};
use crate::{
    admission::Reusable,
    error::{BoxError, ConfigError},
    fault::Fault,
    outcome::{LayerKind, Rejected},
    redact,
    respond::{AsError, Reject, Respond, RespondWith},
    time::CallClock,
    timeout::{AsIs, TimedBody, Timeout, TimeoutFuture, TimeoutLayer, Timeouts},
};

/// Sets one absolute deadline for every call, enforces it, and sends the time left to the next hop.
///
/// A layer, its clones and all services that it wraps share the same settings. A setter after the layer has built a
/// service returns a layer with state of its own, so the services that exist keep their settings: use the
/// [handle](DeadlineHandle) to change a running layer. See the [module](super).
#[must_use = "a layer does nothing until it wraps a service"]
#[derive(Clone)]
pub struct DeadlineLayer<R = AsError> {
    times: Arc<DeadlineTimes>,
    pub(super) codec: Option<Arc<dyn Codec>>,
    timeout: TimeoutLayer<AsIs, R>,
    pub(super) fault: Fault,
}

impl DeadlineLayer {
    /// Creates a layer that uses the deadline in the extensions of a request or the `grpc-timeout` of a gRPC request,
    /// whichever is earlier.
    pub fn new() -> Self {
        let timeout = TimeoutLayer::new_by(LayerKind::Deadline, Timeouts::new()).as_is();
        Self { times: Arc::default(), codec: None, timeout, fault: Fault::default() }
    }
}

impl Default for DeadlineLayer {
    fn default() -> Self {
        Self::new()
    }
}

impl<R> DeadlineLayer<R> {
    /// Sets the time from the start of a call to its deadline, for calls whose headers set none. It is also the maximum
    /// that a header can set, unless [`max`](Self::max) sets another: a caller never extends the bound of the operator.
    /// Default: none, so calls without a header have no deadline, and headers have no maximum.
    ///
    /// A [`Deadline`](crate::time::Deadline) that the application has made itself and inserted in the extensions
    /// replaces the default, also if it is later, and is then the maximum of a header. Any other deadline in the
    /// extensions (of a caller, or of another layer) applies if it is earlier.
    ///
    /// [`DeadlineHandle::set_default`] changes it while the layer runs.
    pub fn default_of(self, time: Duration) -> Self {
        self.set("default_of", time, |times| &times.default)
    }

    /// Sets the maximum time that a header, a deadline of the caller in the extensions, or the default can set. It does
    /// not bound a deadline that the application has made itself. Default: the time of
    /// [`default_of`](Self::default_of).
    ///
    /// [`DeadlineHandle::set_max`] changes it while the layer runs.
    pub fn max(self, time: Duration) -> Self {
        self.set("max", time, |times| &times.max)
    }

    /// Sets the time reserved for sending the response back. The deadline of the wrapped service and of the next hop is
    /// earlier by this time. Default: none.
    ///
    /// [`DeadlineHandle::set_reserve`] changes it while the layer runs.
    pub fn reserve(mut self, time: Duration) -> Self {
        self = self.fork_if_used();
        set(&self.times.reserve, Some(time));
        self
    }

    /// Sets a header in which the time left is read and written in whole milliseconds, in addition to `grpc-timeout`.
    /// Examples are `x-request-timeout-ms` and Envoy's `x-envoy-expected-rq-timeout-ms`. Replaces an earlier header or
    /// [codec](Self::codec). Default: none.
    pub fn header(mut self, name: &str) -> Self {
        match HeaderName::try_from(name) {
            Ok(name) => self.codec(Millis(name)),
            Err(_) => {
                let remedy = "use a header's name, such as x-request-timeout-ms";
                self.fault
                    .get_or_insert_with(|| ConfigError::new("header", redact::Value(name), remedy));
                self
            }
        }
    }

    /// Sets a codec that reads and writes the time left in another form, in addition to `grpc-timeout`. Replaces an
    /// earlier codec or [header](Self::header).
    pub fn codec(mut self, codec: impl Codec) -> Self {
        self.codec = Some(Arc::new(codec));
        self
    }

    /// Responds to calls whose deadline has passed with 504 or `DEADLINE_EXCEEDED`, and leaves the error type of the
    /// service unchanged. See [`Respond`].
    pub fn respond(self) -> DeadlineLayer<Respond> {
        let Self { times, codec, timeout, fault } = self;
        DeadlineLayer { times, codec, timeout: timeout.respond(), fault }
    }

    /// Responds to calls whose deadline has passed with the result of a closure.
    pub fn respond_with<F, Res, E>(self, respond: F) -> DeadlineLayer<RespondWith<F>>
    where
        F: Fn(&Rejected) -> Result<Res, E> + Clone + Send + Sync + 'static,
    {
        let Self { times, codec, timeout, fault } = self;
        DeadlineLayer { times, codec, timeout: timeout.respond_with(respond), fault }
    }

    /// Sets the name of the layer in errors and events. Only the first call has an effect.
    pub fn name(mut self, name: &str) -> Self {
        self = self.fork_if_used();
        self.timeout = self.timeout.name(name);
        self
    }

    /// Returns the handle of the layer, which reads its state and changes its times.
    #[must_use]
    pub fn handle(&self) -> DeadlineHandle {
        DeadlineHandle { times: self.times.clone(), inner: self.timeout.handle() }
    }

    /// Returns the layer, or the error of its first invalid setting. A layer with an invalid setting that is used
    /// nevertheless ignores that setting and reports it in an event.
    ///
    /// # Errors
    ///
    /// The [`ConfigError`] names the field, the value and the remedy.
    pub fn checked(mut self) -> Result<Self, ConfigError> {
        self.fault.take().map_or(Ok(self), Err)
    }

    fn set(
        mut self,
        field: &'static str,
        time: Duration,
        setting: impl FnOnce(&DeadlineTimes) -> &AtomicU64,
    ) -> Self {
        if let Some(time) = self.fault.accept(ConfigError::above_zero(field, time)) {
            self = self.fork_if_used();
            set(setting(&self.times), Some(time));
        }
        self
    }

    /// Returns the layer itself, or, if it has built a service, a layer with the same settings and state of its own.
    fn fork_if_used(mut self) -> Self {
        if self.times.is_used() {
            self.times = Arc::new(self.times.fork());
            self.timeout = self.timeout.fork_if_used();
        }
        self
    }
}

impl<S, R: Clone> Layer<S> for DeadlineLayer<R> {
    type Service = DeadlineService<S, R>;

    fn layer(&self, inner: S) -> Self::Service {
        self.times.set_used();
        let layer = LayerKind::Deadline.as_str();
        self.fault.report(layer, "", "the setting is ignored");
        DeadlineService {
            times: self.times.clone(),
            codec: self.codec.clone(),
            timeout: self.timeout.layer(inner),
        }
    }
}

impl<R> fmt::Debug for DeadlineLayer<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeadlineLayer")
            .field("times", &self.times)
            .field("fault", &self.fault)
            .finish_non_exhaustive()
    }
}

/// The service of a [`DeadlineLayer`].
#[derive(Clone)]
pub struct DeadlineService<S, R = AsError> {
    times: Arc<DeadlineTimes>,
    codec: Option<Arc<dyn Codec>>,
    timeout: Timeout<S, AsIs, R>,
}

impl<S, R> DeadlineService<S, R> {
    /// Returns a reference to the wrapped service.
    pub fn get_ref(&self) -> &S {
        self.timeout.get_ref()
    }

    /// Returns a mutable reference to the wrapped service.
    pub fn get_mut(&mut self) -> &mut S {
        self.timeout.get_mut()
    }

    /// Returns the wrapped service.
    pub fn into_inner(self) -> S {
        self.timeout.into_inner()
    }
}

impl<S, R> fmt::Debug for DeadlineService<S, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeadlineService").field("times", &self.times).finish_non_exhaustive()
    }
}

impl<S, R, ReqB, B> Service<Request<ReqB>> for DeadlineService<S, R>
where
    S: Service<Request<ReqB>, Response = Response<B>> + Reusable,
    ReqB: 'static,
    B: Body<Error: Into<BoxError>>,
    R: Reject<Request<ReqB>, Response<TimedBody<B>>, S::Error>,
{
    type Response = Response<TimedBody<B>>;
    type Error = R::Error;
    type Future = TimeoutFuture<S::Future, Request<ReqB>, AsIs, R>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), R::Error>> {
        self.timeout.poll_ready(cx)
    }

    fn call(&mut self, request: Request<ReqB>) -> Self::Future {
        let _clock = CallClock::begin();
        let Self { times, codec, timeout } = self;
        timeout.begin(request, |request| (None, times.apply(codec.as_deref(), request)))
    }
}
