use std::{
    fmt,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body::Body;
use tonic::{body::Body as TonicBody, transport::Channel};
use tower_layer::Layer;
use tower_service::Service;

use super::{
    client::{ClientHandle, ClientStack, ClientStackService},
    future::{ClientFuture, ClientResponse},
};
use crate::{
    client_error::ClientError,
    config::{ClientConfig, ConfigErrors},
    error::{BoxError, ConfigError},
    respond::{RespondLayer, RespondService},
    retry::RetryLayer,
};

type LayeredChannel<S> = RespondService<ClientStackService<IntoTonicBody<S>>>;

/// Returns the recommended client for gRPC with the settings of this configuration: a [`ClientStack`] around a tonic
/// [`Channel`], or around any other service that accepts the requests of a generated client.
///
/// Generated clients accept the returned service unchanged. Its outermost layer is a [`RespondLayer`], so a rejection
/// is a gRPC status: `UNAVAILABLE` for an open circuit or a full limit, `DEADLINE_EXCEEDED` for a deadline or a
/// timeout. Retries follow [`RetryLayer::grpc`]: a status of `UNAVAILABLE` is retried for every call. A hedge
/// attempt is sent only for a call with an `idempotency-key` in its metadata, because every gRPC call is a `POST`.
///
/// ```no_run
/// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
/// use buttress::config::ClientConfig;
/// use tonic::transport::Endpoint;
/// use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
///
/// let channel = Endpoint::from_static("http://search:50051").connect_lazy();
/// let service = buttress::grpc(&ClientConfig::from_env("search")?, channel)?;
/// let handle = service.handle();
/// let mut client = HealthClient::new(service);
/// let status = client.check(HealthCheckRequest::default()).await?;
/// println!("{status:?} {:?}", handle.snapshot());
/// # Ok(()) }
/// ```
///
/// # Deadlines
///
/// `deadline_default` applies to calls without a deadline. tonic's `Request::set_timeout` sends `grpc-timeout`, which
/// is a deadline of the caller: the default is also its maximum, unless `deadline_max` states another one. To give a
/// call, such as a watch, more time than the default, insert a [`Deadline`](crate::time::Deadline) into the extensions
/// of its request.
///
/// # Errors
///
/// Returns the errors of [`check`](ClientConfig::check), and an error for each setting that has no effect here and that
/// the application has set: the settings of the connections, the health probe and `check_health`, because the channel
/// makes its own connections, and `retry_unprocessed`, which lists HTTP statuses. `connect_timeout` is an exception: it
/// states the timeout of the channel's `Endpoint`, with which `check` compares the other timeouts.
pub fn grpc<S>(config: &ClientConfig, channel: S) -> Result<GrpcClient<S>, ConfigErrors>
where
    S: Clone,
{
    config.check()?;
    ConfigErrors::none_of(without_effect(config))?;
    let stack = ClientStack::over(config, RetryLayer::grpc())?;
    let service = RespondLayer::new().layer(stack.layer(IntoTonicBody { inner: channel }));
    Ok(GrpcClient { service, handle: stack.handle() })
}

/// Returns an error for each setting that has no effect over a channel, or for gRPC calls.
fn without_effect(config: &ClientConfig) -> Vec<ConfigError> {
    let of_channel = "has no effect over a channel, which makes its own connections: set it at the channel's \
                      `Endpoint`, and leave it out here";
    let of_http = "has no effect for gRPC calls, whose gRPC status decides: leave it out here";
    let of_uri = "has no effect over a channel: pass a health check to `check_health` of the handle, and leave it out \
                  here";
    let error = |(key, value), remedy| ConfigError::new(key, value, remedy);
    let connections = config.chosen(&[&config.connect, &config.health_probe]).into_iter();
    let connections = connections.filter(|(key, _)| *key != "connect_timeout");
    let statuses = config.chosen(&[&config.retry]).into_iter();
    let statuses = statuses.filter(|(key, _)| *key == "retry_unprocessed");
    let uris = config.chosen(&[&config.check_health]).into_iter();
    let connections = connections.map(|chosen| error(chosen, of_channel));
    let statuses = statuses.map(|chosen| error(chosen, of_http));
    connections.chain(statuses).chain(uris.map(|chosen| error(chosen, of_uri))).collect()
}

/// The recommended client for gRPC: made by [`grpc`]. Clones share its state.
///
/// # Errors
///
/// Fails with a [`ClientError`] for everything that is not a rejection, such as a broken connection. tonic converts it
/// into a status by its sources.
///
/// # Cancellation
///
/// Dropping a call's future or its response stream ends the attempt in flight.
#[derive(Clone)]
pub struct GrpcClient<S = Channel> {
    service: LayeredChannel<S>,
    handle: ClientHandle,
}

impl<S> GrpcClient<S> {
    /// Returns the handle of the stack.
    #[must_use]
    pub fn handle(&self) -> ClientHandle {
        self.handle.clone()
    }
}

impl<S: Clone> GrpcClient<S> {
    /// Sets a closure that writes `traceparent` or any other header to each attempt, as
    /// [`AttemptHeadersLayer`](crate::retry::AttemptHeadersLayer) does. By default there is no closure. The client
    /// keeps its channel and its state.
    #[must_use]
    pub fn attempt_headers(
        self,
        write: impl Fn(u32, &mut HeaderMap) + Send + Sync + 'static,
    ) -> Self {
        let Self { service, handle } = self;
        let channel = service.get_ref().get_ref().clone();
        let stack = handle.stack.clone().attempt_headers(write);
        Self { service: RespondLayer::new().layer(stack.layer(channel)), handle }
    }
}

impl<S> fmt::Debug for GrpcClient<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GrpcClient").field("handle", &self.handle).finish_non_exhaustive()
    }
}

impl<S, B> Service<Request<TonicBody>> for GrpcClient<S>
where
    S: Service<Request<TonicBody>, Response = Response<B>> + Clone,
    S::Error: Into<BoxError> + 'static,
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    type Response = ClientResponse<<LayeredChannel<S> as Service<Request<TonicBody>>>::Response>;
    type Error = ClientError;
    type Future = ClientFuture<<LayeredChannel<S> as Service<Request<TonicBody>>>::Future>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ClientError>> {
        Service::<Request<TonicBody>>::poll_ready(&mut self.service, cx).map_err(ClientError::new)
    }

    #[inline]
    fn call(&mut self, request: Request<TonicBody>) -> Self::Future {
        ClientFuture::new(self.service.call(request))
    }
}

// ===== The body =====

/// Converts request bodies into the only body type that a channel accepts.
#[derive(Clone, Debug)]
pub struct IntoTonicBody<S> {
    inner: S,
}

impl<S, B> Service<Request<B>> for IntoTonicBody<S>
where
    S: Service<Request<TonicBody>>,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    #[inline]
    fn call(&mut self, request: Request<B>) -> S::Future {
        self.inner.call(request.map(TonicBody::new))
    }
}
