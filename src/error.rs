use std::{borrow::Cow, error::Error, fmt, io, iter, time::Duration};

use crate::redact;

/// A boxed error: the error type of a client stack.
///
/// # Tasks and handlers
///
/// All layers of this crate can be used inside of `tokio::spawn` and of an axum handler. tower's `Buffer` over its p2c
/// `Balance` cannot, whatever the endpoints are. rustc then reports one of these errors, which do not name the service
/// that causes them (rust-lang/rust#100013):
///
/// ```text
/// implementation of `From` is not general enough
///   `Box<(dyn std::error::Error + Send + Sync + 'static)>` must implement `From<Box<(dyn std::error::Error + Send + Sync + '0)>>`
/// implementation of `FnOnce` is not general enough
///   `fn(Box<(dyn std::error::Error + Send + Sync + '0)>) -> Box<dyn …>` must implement `FnOnce<(Box<(dyn … + 'static)>,)>`
/// ```
///
/// There are two remedies. One is a function that is generic over the service and contains the whole task or the whole
/// router, which costs nothing. The other is
/// [`BoxCloneSyncService`](https://docs.rs/tower/0.5/tower/util/struct.BoxCloneSyncService.html), which boxes the
/// future of each call.
///
/// ```
/// use buttress::{BoxError, CircuitBreakerLayer};
/// use http::{Request, Response};
/// use tower::{
///     Service, ServiceBuilder, ServiceExt, balance::p2c::Balance, buffer::Buffer,
///     discover::ServiceList, load::{CompleteOnResponse, PendingRequests}, service_fn,
///     util::BoxCloneSyncService,
/// };
///
/// async fn send<S>(service: S) -> Result<S::Response, BoxError>
/// where
///     S: Service<Request<()>, Error = BoxError>,
/// {
///     service.oneshot(Request::new(())).await
/// }
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), BoxError> {
/// # type Body = http_body_util::Empty<bytes::Bytes>;
/// let upstream = service_fn(|_: Request<()>| async { Ok::<_, BoxError>(Response::new(Body::new())) });
/// let endpoints: Vec<_> = (0..3)
///     .map(|_| {
///         let breaker = CircuitBreakerLayer::http().backpressure();
///         let endpoint = ServiceBuilder::new().layer(breaker).service(upstream);
///         PendingRequests::new(endpoint, CompleteOnResponse::default())
///     })
///     .collect();
/// let balance = Buffer::new(Balance::new(ServiceList::new(endpoints)), 64);
///
/// // `tokio::spawn(async move { balance.oneshot(Request::new(())).await })` does not compile.
/// tokio::spawn(send(balance.clone())).await??;
///
/// let boxed = BoxCloneSyncService::new(balance);
/// tokio::spawn(async move { boxed.oneshot(Request::new(())).await }).await??;
/// # Ok(()) }
/// ```
pub type BoxError = Box<dyn Error + Send + Sync>;

/// Returns the next error in a chain. For an `io::Error` that wraps another error, this is the wrapped error, which its
/// `source()` skips.
fn next<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a (dyn Error + 'static)> {
    match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
        Some(made_of) => Some(made_of),
        None => error.source(),
    }
}

/// The maximum number of errors of a chain that are examined. An error can be its own source, and no stack makes a
/// longer chain.
const MAX_CHAIN: usize = 16;

/// Returns an error and its sources, outermost first, at most [`MAX_CHAIN`] of them.
pub(crate) fn chain<'a>(
    error: &'a (dyn Error + 'static),
) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    iter::successors(Some(error), |error| next(*error)).take(MAX_CHAIN)
}

/// An error and its sources on one line, without secrets: `could not connect: connection refused`.
pub(crate) struct Chain<'a>(pub(crate) &'a (dyn Error + 'static));

impl Chain<'_> {
    /// Returns the line, at most `max` bytes of it.
    pub(crate) fn within(&self, max: usize) -> String {
        redact::display(self, max)
    }
}

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Each error of the chain is redacted by itself, so that no URI continues in the text of the next one.
        let mut outer = redact::display(self.0, redact::MAX_SCAN);
        f.write_str(&outer)?;
        for error in chain(self.0).skip(1) {
            // A wrapper often displays the text of the error that it wraps. Repeated text is omitted.
            let text = redact::display(error, redact::MAX_SCAN);
            if text != outer {
                write!(f, ": {text}")?;
            }
            outer = text;
        }
        Ok(())
    }
}

/// A setting that cannot work: its name, its value, and the correction.
///
/// A setter never panics and never ignores such a value: the layer records the first one.
/// [`checked`](crate::breaker::CircuitBreakerLayer::checked) returns it when the stack is built.
///
/// A layer that is used without `checked` rejects every call, with this error as the source of the
/// [`Rejected`](crate::outcome::Rejected). There are two exceptions: a retry or a hedge passes every call through
/// unchanged, and a deadline layer ignores the setting. Every layer reports the error in the log, by one ERROR event at
/// once and then by at most one event in 10 s. The field `occurrences` of the event is the number of calls since the
/// previous event, or the number of wrapped services for a layer that passes calls through.
///
/// The text of the error has at most 1536 bytes, whatever the length of the value is, and contains no
/// [secrets](crate#secrets).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConfigError {
    /// The name of the setter, such as `queue.max_wait`. For an unknown setting the field is `unknown setting`, and
    /// the [`value`](Self::value) is the unknown name.
    pub field: &'static str,
    /// The value that was set, at most 256 bytes of it. Userinfo, query and fragment of URIs are replaced by `***`.
    pub value: String,
    /// The correction, at most 1024 bytes, redacted as the value is.
    pub remedy: Cow<'static, str>,
}

impl ConfigError {
    /// The [`field`](Self::field) of the error of an unknown setting. Its value is the name of the setting.
    pub(crate) const UNKNOWN_SETTING: &'static str = "unknown setting";

    pub(crate) fn new(
        field: &'static str,
        value: impl fmt::Debug,
        remedy: impl Into<Cow<'static, str>>,
    ) -> Self {
        let remedy = match remedy.into() {
            Cow::Owned(remedy) => Cow::Owned(redact::text(&remedy, redact::MAX_REMEDY)),
            fixed => fixed,
        };
        Self { field, value: redact::debug(&value, redact::MAX_VALUE), remedy }
    }

    /// Returns the value, or an error if it is zero.
    pub(crate) fn above_zero(field: &'static str, value: Duration) -> Result<Duration, Self> {
        if value.is_zero() {
            return Err(Self::new(field, value, "use a time above zero"));
        }
        Ok(value)
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.field {
            Self::UNKNOWN_SETTING => write!(f, "{} `{}`: {}", self.field, self.value, self.remedy),
            field => write!(f, "`{field}` is {}: {}", self.value, self.remedy),
        }
    }
}

impl Error for ConfigError {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        fault::Fault,
        outcome::{LayerKind, Rejected},
    };

    #[test]
    fn a_chain_is_one_line_and_no_longer_than_it_may_be() {
        let twice = io::Error::other(io::Error::other("no route to host"));
        assert_eq!(Chain(&twice).within(99), "no route to host");
        let fault = ConfigError::new("limit", 0, "use 1 or more");
        let fault = Fault::from(Some(fault));
        let label = fault.label().expect("an error").clone();
        let rejected = Rejected::misconfigured(LayerKind::User, "", label);
        let text = "rejected by user: layer is misconfigured: `limit` is 0: use 1 or more";
        assert_eq!(Chain(&rejected).within(99), text);
        let long = io::Error::other("ä".repeat(600));
        assert_eq!(Chain(&long).within(511), "ä".repeat(247) + "… (1200 bytes)");
    }
}
