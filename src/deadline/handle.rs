use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use http::Request;

use super::codec::{Codec, GrpcTimeout};
use crate::{
    error::ConfigError,
    event::settings_changed,
    outcome::{LayerKind, TimeoutPhase, grpc},
    time::{CallClock, Deadline, DeadlineSource},
    timeout::TimeoutHandle,
};

/// The settings of a layer in milliseconds, rounded up; 0 means none.
#[derive(Default)]
pub(super) struct DeadlineTimes {
    pub(super) default: AtomicU64,
    pub(super) max: AtomicU64,
    pub(super) reserve: AtomicU64,
    /// The layer has built a service.
    is_used: AtomicBool,
}

fn get(ms: &AtomicU64) -> Option<Duration> {
    Some(ms.load(Relaxed)).filter(|ms| *ms > 0).map(Duration::from_millis)
}

pub(super) fn set(ms: &AtomicU64, time: Option<Duration>) {
    let whole = time.map(|time| time.as_nanos().div_ceil(1_000_000));
    ms.store(whole.map_or(0, |ms| u64::try_from(ms).unwrap_or(u64::MAX)), Relaxed);
}

impl DeadlineTimes {
    /// Returns a copy of the settings, which no service uses.
    pub(super) fn fork(&self) -> Self {
        let copy = |ms: &AtomicU64| AtomicU64::new(ms.load(Relaxed));
        let (default, max, reserve) = (copy(&self.default), copy(&self.max), copy(&self.reserve));
        Self { default, max, reserve, is_used: AtomicBool::new(false) }
    }

    pub(super) fn is_used(&self) -> bool {
        self.is_used.load(Relaxed)
    }

    /// Records that the layer has built a service. Writes once, because a layer can be applied once per connection.
    pub(super) fn set_used(&self) {
        if !self.is_used() {
            self.is_used.store(true, Relaxed);
        }
    }

    /// Sets the deadline of a call in the extensions of its request, and writes the time that is left to the headers
    /// for the next hop.
    pub(super) fn apply<B>(
        &self,
        codec: Option<&dyn Codec>,
        request: &mut Request<B>,
    ) -> Option<Deadline> {
        let grpc = grpc::is_grpc_call(request.method(), request.headers());
        let read = |codec: &dyn Codec| Some((codec.read(request.headers())?, codec.resolution()));
        let own = codec.and_then(read);
        let sent = if grpc { own.into_iter().chain(read(&GrpcTimeout)).min() } else { own };
        let by_caller = sent.map(|(time, _)| (time, DeadlineSource::Caller));
        let by_operator = |time| (time, DeadlineSource::Operator);
        let carried = Deadline::of(request.extensions());
        // A deadline of the application replaces the default and the maximum. The earlier of it and a header applies.
        let is_of_application = carried.is_some_and(|deadline| deadline.is_of_application());
        let default = get(&self.default).filter(|_| !is_of_application);
        // A header never extends the default, unless the operator sets a maximum.
        let max = get(&self.max).filter(|_| !is_of_application).or(default);
        let bounded = match (by_caller, max) {
            (Some((sent, _)), Some(max)) if max < sent => Some(by_operator(max)),
            (Some(sent), _) => Some(sent),
            (None, max) => {
                default.map(|default| by_operator(max.map_or(default, |max| default.min(max))))
            }
        };
        // The maximum of a header also applies to a deadline of the caller that the application has passed on.
        let is_of_caller =
            carried.is_some_and(|deadline| deadline.source() == DeadlineSource::Caller);
        let bound = max.filter(|_| is_of_caller).map(by_operator);
        // If an outer layer of this stack has written the carried deadline to the headers, the header does not make it
        // a deadline of the caller.
        let repeats_carried = sent.zip(carried).is_some_and(|((sent, resolution), carried)| {
            let left = carried.at().saturating_duration_since(CallClock::now());
            // `grpc-timeout` has at most eight digits, so its unit is coarser beyond 27 hours.
            sent <= left && left - sent <= resolution.saturating_add(left / 100_000)
        });
        let bounded =
            bounded.filter(|(_, source)| !repeats_carried || *source == DeadlineSource::Operator);
        let reserve = get(&self.reserve).unwrap_or_default();
        // Subtracted while it is a duration, because an `Instant` can represent only a limited range.
        let set = |(time, source): (Duration, DeadlineSource)| {
            let deadline = Deadline::after_from(time.saturating_sub(reserve), CallClock::now());
            deadline.with_source(source).by_layer()
        };
        let less = carried.map(|deadline| deadline.earlier_by(reserve));
        let deadline = less.into_iter().chain(bounded.map(set)).chain(bound.map(set)).min()?;
        if carried != Some(deadline) {
            request.extensions_mut().insert(deadline);
        }
        let mut write = |codec: &dyn Codec| {
            let left = deadline.at().saturating_duration_since(CallClock::now());
            codec.write(left, request.headers_mut());
        };
        if grpc {
            write(&GrpcTimeout);
        }
        if let Some(codec) = codec {
            write(codec);
        }
        Some(deadline)
    }
}

/// Reads the state of a deadline layer and changes its times, from outside of the stack.
#[derive(Clone)]
pub struct DeadlineHandle {
    pub(super) times: Arc<DeadlineTimes>,
    pub(super) inner: TimeoutHandle,
}

/// A snapshot of a deadline layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeadlineSnapshot {
    /// The number of calls that were rejected because their deadline had passed before they began.
    pub rejected: u64,
    /// The number of calls in flight that were ended at their deadline.
    pub ended: u64,
}

impl DeadlineHandle {
    /// Returns a snapshot of the layer.
    #[must_use]
    pub fn snapshot(&self) -> DeadlineSnapshot {
        let inner = self.inner.snapshot();
        DeadlineSnapshot {
            rejected: inner.rejected_deadline,
            ended: inner.timed_out_by(TimeoutPhase::Deadline),
        }
    }

    /// Sets the [default](super::layer::DeadlineLayer::default_of) for the calls that begin from now on, or none.
    ///
    /// # Errors
    ///
    /// Fails if the time is zero.
    pub fn set_default(&self, time: impl Into<Option<Duration>>) -> Result<(), ConfigError> {
        set(&self.times.default, above_zero("default_of", time.into())?);
        self.report_setting("default_of");
        Ok(())
    }

    /// Sets the [maximum time](super::layer::DeadlineLayer::max) of a header for the calls that begin from now on. With
    /// `None`, the default is the maximum.
    ///
    /// # Errors
    ///
    /// Fails if the time is zero.
    pub fn set_max(&self, time: impl Into<Option<Duration>>) -> Result<(), ConfigError> {
        set(&self.times.max, above_zero("max", time.into())?);
        self.report_setting("max");
        Ok(())
    }

    /// Sets the time that is [reserved](super::layer::DeadlineLayer::reserve) for sending the response back, for the
    /// calls that begin from now on.
    pub fn set_reserve(&self, time: impl Into<Option<Duration>>) {
        set(&self.times.reserve, time.into());
        self.report_setting("reserve");
    }

    /// Reports a setting that has changed.
    fn report_setting(&self, key: &'static str) {
        settings_changed!(timeout, self.times.is_used(), LayerKind::Deadline.as_str(), "", key);
    }
}

fn above_zero(
    field: &'static str,
    time: Option<Duration>,
) -> Result<Option<Duration>, ConfigError> {
    time.map(|time| ConfigError::above_zero(field, time)).transpose()
}

impl fmt::Debug for DeadlineTimes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeadlineTimes")
            .field("default", &get(&self.default))
            .field("max", &get(&self.max))
            .field("reserve", &get(&self.reserve))
            .finish()
    }
}

impl fmt::Debug for DeadlineHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("DeadlineHandle").field(&self.times).finish()
    }
}
