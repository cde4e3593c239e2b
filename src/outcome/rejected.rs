use std::{error::Error, fmt, sync::Arc, time::Duration};

use super::rejected_kind::RejectedKind;
use crate::{
    error,
    event::{self, event},
    fault::LayerName,
    time::DeadlineSource,
};

/// The rejection or the timeout of a call by a layer.
///
/// It states the layer, the reason and the time to retry. In a stack that fails with boxed errors,
/// [`Rejected::find`] finds it anywhere in a chain of sources. In a stack that responds, it is in the extensions of the
/// response.
///
/// With the feature `tonic`, its source is a `tonic::Status` with the code that a response would have
/// (`UNAVAILABLE`, `DEADLINE_EXCEEDED`, `RESOURCE_EXHAUSTED`). A generated client then fails with that code although no
/// layer responds. The status carries no pushback. The source of [`Misconfigured`](RejectedKind::Misconfigured) is the
/// [`ConfigError`](crate::ConfigError), which tonic reports as `UNKNOWN`.
#[derive(Clone)]
pub struct Rejected {
    kind: RejectedKind,
    layer: LayerKind,
    /// A set of bits: the source of the deadline that ended the call, if a deadline did, and [`DRAINS`].
    marks: u8,
    retry_after_ms: u32,
    label: Option<Arc<LayerName>>,
}

/// The layers that reject calls or emit events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum LayerKind {
    CircuitBreaker,
    ConcurrencyLimit,
    HealthProbe,
    /// A check of the health registry, which rejects no call.
    HealthCheck,
    Lifecycle,
    Listener,
    Retry,
    Hedge,
    Connect,
    Timeout,
    /// A timeout around a service of this server: the server itself was too slow, not an upstream.
    ServerTimeout,
    Deadline,
    /// A ready-made stack.
    Stack,
    /// The application, by [`Rejected::new`].
    User,
}

impl LayerKind {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::CircuitBreaker => "circuit_breaker",
            Self::ConcurrencyLimit => "concurrency_limit",
            Self::HealthProbe => "health_probe",
            Self::HealthCheck => "health_check",
            Self::Lifecycle => "lifecycle",
            Self::Listener => "listener",
            Self::Retry => "retry",
            Self::Hedge => "hedge",
            Self::Connect => "connect",
            Self::Timeout => "timeout",
            Self::ServerTimeout => "server_timeout",
            Self::Deadline => "deadline",
            Self::Stack => "stack",
            Self::User => "user",
        }
    }
}

/// `retry_after_ms` of a rejection without a time to retry.
const NO_HINT: u32 = u32::MAX;

/// A deadline of the caller ended the call.
const CALLER_DEADLINE: u8 = 1;
/// A deadline of the operator ended the call.
const OPERATOR_DEADLINE: u8 = 2;
/// The body of the request is drained.
const DRAINS: u8 = 4;

impl Rejected {
    pub(crate) fn by(layer: LayerKind, kind: RejectedKind) -> Self {
        Self { kind, layer, marks: 0, retry_after_ms: NO_HINT, label: None }
    }

    /// Returns the rejection of a call because of the fault of the layer `name`, and reports both.
    pub(crate) fn misconfigured(layer: LayerKind, name: &str, label: Arc<LayerName>) -> Self {
        // A response to a rejected call does not contain the error, so the log must.
        if let Some(fault) = &label.fault {
            fault.report(layer.as_str(), name, "every call is rejected");
        }
        report_rejection(layer, name, RejectedKind::Misconfigured, None, false);
        Self {
            kind: RejectedKind::Misconfigured,
            layer,
            marks: 0,
            retry_after_ms: NO_HINT,
            label: Some(label),
        }
    }

    pub(crate) fn labelled(mut self, label: Option<Arc<LayerName>>) -> Self {
        self.label = label;
        self
    }

    /// Emits the event of this rejection, and returns the rejection.
    #[inline]
    pub(crate) fn reported(self) -> Self {
        if event::is_debug() {
            let name = self.name().unwrap_or_default();
            emit_rejection(self.layer, name, self.kind, self.retry_after(), false);
        }
        self
    }

    /// Returns a rejection by the application. A stack converts it into the same response as a rejection by one of its
    /// layers: see [`Respond`](crate::respond::Respond).
    #[must_use]
    pub fn new(kind: RejectedKind) -> Self {
        Self::by(LayerKind::User, kind)
    }

    /// Returns the same rejection with a time to retry, in whole milliseconds, at most 49 days. The time is rounded up,
    /// so that no caller retries too early.
    #[must_use]
    pub fn with_retry_after(self, after: Duration) -> Self {
        let begun = u64::from(after.subsec_nanos().div_ceil(1_000_000));
        self.with_retry_after_ms(after.as_secs().saturating_mul(1000).saturating_add(begun))
    }

    #[inline]
    pub(crate) fn with_retry_after_ms(mut self, ms: u64) -> Self {
        self.retry_after_ms = ms.min(u64::from(NO_HINT - 1)) as u32;
        self
    }

    /// Returns the reason for the rejection.
    #[must_use]
    pub const fn kind(&self) -> RejectedKind {
        self.kind
    }

    /// Returns the layer that rejected the call: `circuit_breaker`, `concurrency_limit`, `health_probe`, …
    #[must_use]
    pub const fn layer(&self) -> &'static str {
        self.layer.as_str()
    }

    pub(crate) fn with_deadline_source(mut self, source: Option<DeadlineSource>) -> Self {
        self.marks |= match source {
            None => 0,
            Some(DeadlineSource::Caller) => CALLER_DEADLINE,
            Some(DeadlineSource::Operator) => OPERATOR_DEADLINE,
        };
        self
    }

    /// Marks a rejection whose request body is drained.
    pub(crate) fn draining(mut self) -> Self {
        self.marks |= DRAINS;
        self
    }

    /// Returns whether the body of the rejected request is drained.
    pub(crate) const fn is_draining(&self) -> bool {
        self.marks & DRAINS != 0
    }

    /// Returns the source of the deadline that ended the call in flight, if a deadline did. A call that ended by a
    /// deadline of the [caller](DeadlineSource::Caller) carries no information about the upstream.
    #[must_use]
    pub const fn deadline_source(&self) -> Option<DeadlineSource> {
        if self.marks & CALLER_DEADLINE != 0 {
            Some(DeadlineSource::Caller)
        } else if self.marks & OPERATOR_DEADLINE != 0 {
            Some(DeadlineSource::Operator)
        } else {
            None
        }
    }

    /// Returns whether the call was in flight and ended because it took too long. The upstream may have processed it.
    #[must_use]
    pub const fn is_timeout(&self) -> bool {
        matches!(self.kind, RejectedKind::TimedOut(_))
    }

    /// Returns whether this server was too slow, not an upstream.
    pub(crate) const fn is_by_server(&self) -> bool {
        matches!(self.layer, LayerKind::ServerTimeout)
    }

    /// Returns the name of the layer, if it has one.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.label.as_deref().map(|label| &*label.name).filter(|name| !name.is_empty())
    }

    /// Returns the time from the rejection until a retry may succeed, if it is known.
    #[must_use]
    pub const fn retry_after(&self) -> Option<Duration> {
        match self.retry_after_ms {
            NO_HINT => None,
            ms => Some(Duration::from_millis(ms as u64)),
        }
    }

    /// Finds a rejection in `error` and its sources.
    #[must_use]
    pub fn find<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a Self> {
        error::chain(error).find_map(|error| error.downcast_ref())
    }
}

/// Emits the event "call rejected", which all layers share. `is_shadow`: the layer is in shadow mode and admits the
/// call.
#[inline]
pub(crate) fn report_rejection(
    layer: LayerKind,
    name: &str,
    kind: RejectedKind,
    retry_after: Option<Duration>,
    is_shadow: bool,
) {
    if event::is_debug() {
        emit_rejection(layer, name, kind, retry_after, is_shadow);
    }
}

#[cold]
fn emit_rejection(
    layer: LayerKind,
    name: &str,
    kind: RejectedKind,
    retry_after: Option<Duration>,
    is_shadow: bool,
) {
    macro_rules! emit {
        ($target:ident) => {
            event!(
                $target,
                DEBUG,
                layer.as_str(),
                name,
                reason = kind.as_str(),
                retry_after_ms = retry_after.map(event::ms),
                shadow = is_shadow,
                "call rejected",
            )
        };
    }
    // The target of an event is a constant, so each layer has an event of its own.
    match layer {
        LayerKind::CircuitBreaker => emit!(breaker),
        LayerKind::ConcurrencyLimit => emit!(limit),
        LayerKind::HealthProbe => emit!(health),
        LayerKind::Lifecycle => emit!(lifecycle),
        LayerKind::Retry => emit!(retry),
        LayerKind::Connect => emit!(connect),
        LayerKind::Timeout | LayerKind::ServerTimeout | LayerKind::Deadline => emit!(timeout),
        // These kinds reject no call. The application reports its own rejections (`User`).
        LayerKind::HealthCheck
        | LayerKind::Listener
        | LayerKind::Hedge
        | LayerKind::Stack
        | LayerKind::User => {}
    }
}

impl fmt::Display for Rejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rejected by {}", self.layer())?;
        if let Some(name) = self.name() {
            write!(f, " `{name}`")?;
        }
        write!(f, ": {}", self.kind.phrase())?;
        if let Some(after) = self.retry_after() {
            write!(f, ", retry after {after:?}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Rejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rejected")
            .field("kind", &self.kind)
            .field("layer", &self.layer())
            .field("name", &self.name())
            .field("retry_after", &self.retry_after())
            .finish()
    }
}

impl Error for Rejected {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        if let Some(fault) = self.label.as_deref().and_then(|label| label.fault.as_ref()) {
            return Some(&fault.error);
        }
        #[cfg(feature = "tonic")]
        return Some(super::tonic_status::of(self.kind));
        #[cfg(not(feature = "tonic"))]
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::BoxError;

    #[test]
    fn is_small_enough_for_every_future() {
        assert_eq!(size_of::<Rejected>(), 16);
    }

    #[test]
    fn retry_after_is_never_shorter_than_the_time_to_retry() {
        let after_ms =
            |after| Rejected::new(RejectedKind::Open).with_retry_after(after).retry_after();
        let ms = Duration::from_millis;
        assert_eq!(after_ms(Duration::from_nanos(1)), Some(ms(1)));
        assert_eq!(after_ms(ms(1500) + Duration::from_nanos(1)), Some(ms(1501)));
        assert_eq!((after_ms(ms(1500)), after_ms(Duration::ZERO)), (Some(ms(1500)), Some(ms(0))));
        assert_eq!(after_ms(Duration::MAX), Some(ms(u64::from(u32::MAX - 1))));
    }

    #[test]
    fn is_found_under_boxes_and_sources() {
        #[derive(Debug)]
        struct Outer(BoxError);
        impl fmt::Display for Outer {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("outer")
            }
        }
        impl Error for Outer {
            fn source(&self) -> Option<&(dyn Error + 'static)> {
                Some(&*self.0)
            }
        }
        let boxed: BoxError =
            Box::new(Outer(Box::new(Outer(Box::new(Rejected::new(RejectedKind::Full))))));
        assert_eq!(Rejected::find_in_any(&boxed).map(Rejected::kind), Some(RejectedKind::Full));
        assert!(Rejected::find_in_any(&"no error at all").is_none());
    }

    #[test]
    fn a_ring_of_sources_ends() {
        #[derive(Debug)]
        struct Ring;
        impl fmt::Display for Ring {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("ring")
            }
        }
        impl Error for Ring {
            fn source(&self) -> Option<&(dyn Error + 'static)> {
                Some(&Ring)
            }
        }
        assert!(Rejected::find(&Ring).is_none());
    }
}
