//! Which side's time passes during a call, and which side ended it.
//!
//! A failure counts against the upstream only if the upstream caused it. Four questions decide that, each answered
//! by one mechanism of this file:
//!
//! | question | mechanism |
//! |---|---|
//! | how long has the upstream had the request? | [`UpstreamClock`], kept in the permit |
//! | has the request been sent completely? | [`SentMark`], published by an outer layer that wraps the request body |
//! | what does a pending call wait for? | [`WaitsFor`], reported by an inner layer while it is polled |
//! | why is a call dropped? | [`DropCause`], set by an outer layer around the drop |
//!
//! [`attribute`] turns the answers into an outcome. Nothing here reads a clock before a call has to wait.

use std::{
    cell::Cell,
    fmt,
    num::NonZeroU32,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use super::{Deadline, Outcome, OutcomeKind, Reason, grpc};

// ===== How long the upstream has had the request =====

/// Measures the time that is the upstream's: from when the request has been sent, without the time for which a
/// response waits for its reader.
///
/// One word, because it is part of every permit: 0 is off; else the highest bit is set, the second tells whether the
/// clock is stopped, and the rest are the nanoseconds that it stands at, or those of the [moment](nanos_of) since
/// which it runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct UpstreamClock(u64);

const ON: u64 = 1 << 63;
const STOPPED: u64 = 1 << 62;
const TIME: u64 = STOPPED - 1;

impl UpstreamClock {
    /// The upstream does not have the request yet, or nothing measures the call.
    pub(crate) const OFF: Self = Self(0);

    pub(crate) fn start() -> Self {
        Self::running_since(Instant::now())
    }

    pub(crate) fn running_since(since: Instant) -> Self {
        Self(ON | nanos_of(since))
    }

    fn stopped_at(nanos: u64) -> Self {
        Self(ON | STOPPED | nanos.min(TIME))
    }

    #[inline]
    pub(crate) const fn is_off(self) -> bool {
        self.0 == 0
    }

    const fn is_stopped(self) -> bool {
        self.0 & STOPPED != 0
    }

    /// Returns the time measured so far.
    pub(crate) fn elapsed(self, now: Instant) -> Option<Duration> {
        let nanos = match self.0 & TIME {
            _ if self.is_off() => return None,
            time if self.is_stopped() => time,
            since => since_then(nanos_of(now), since),
        };
        Some(Duration::from_nanos(nanos))
    }

    /// Stops the clock; one that is off stands at zero then.
    pub(crate) fn stop(&mut self, now: Instant) {
        *self = Self::stopped_at(super::nanos(self.elapsed(now).unwrap_or_default()));
    }

    /// Lets a stopped clock run on while the response has no frame for its reader, and stops it otherwise.
    pub(crate) fn body_polled(&mut self, is_pending: bool) {
        if is_pending && self.is_stopped() {
            let since = nanos_of(Instant::now()).wrapping_sub(self.0 & TIME) & TIME;
            *self = Self(ON | since);
        } else if !is_pending && !self.is_off() && !self.is_stopped() {
            self.stop(Instant::now());
        }
    }
}

/// The nanoseconds of an instant since a moment of this process, modulo 2⁶²: only differences have a meaning. The
/// moment may lie after the instant, as paused clocks of several runtimes begin at different times.
fn nanos_of(instant: Instant) -> u64 {
    static EPOCH: OnceLock<Instant> = OnceLock::new();
    let epoch = *EPOCH.get_or_init(Instant::now);
    let nanos = match instant.checked_duration_since(epoch) {
        Some(after) => super::nanos(after),
        None => super::nanos(epoch.saturating_duration_since(instant)).wrapping_neg(),
    };
    nanos & TIME
}

/// The time from one such moment to another, or zero if it lies before it.
fn since_then(now: u64, then: u64) -> u64 {
    let nanos = now.wrapping_sub(then) & TIME;
    if nanos > TIME / 2 { 0 } else { nanos }
}

/// An instant to the millisecond, in half a word: as [`UpstreamClock`], with a range of 24 days to either side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CallerDeadline(NonZeroU32);

impl CallerDeadline {
    #[inline]
    pub(crate) fn of(deadline: Option<Deadline>) -> Option<Self> {
        deadline.and_then(Deadline::of_caller).map(Self::new)
    }

    fn new(at: Instant) -> Self {
        Self(NonZeroU32::new(Self::millis_of(at)).unwrap_or(NonZeroU32::MIN))
    }

    fn millis_of(instant: Instant) -> u32 {
        (nanos_of(instant) / 1_000_000) as u32
    }

    /// Returns the time until the deadline, rounded up, or zero after it.
    fn left(self) -> Duration {
        let left = self.0.get().wrapping_sub(Self::millis_of(Instant::now()));
        let is_over = left > u32::MAX / 2;
        Duration::from_millis(if is_over { 0 } else { left.into() })
    }
}

// ===== Whether the request has been sent =====

/// The progress of a request body, published in the request's extensions by the layer that wraps the body: a
/// [`RetryLayer`](crate::RetryLayer) or a [`HedgeLayer`](crate::HedgeLayer).
///
/// Layers that measure calls start their clocks by it, because the time of a slow upload is the caller's. A client
/// of your own that wraps request bodies can publish one, too: put a clone into the extensions and report each frame.
/// Without a mark the clocks start at the call.
///
/// ```
/// use buttress::call::SentMark;
///
/// let mark = SentMark::new();
/// let mut request = http::Request::new(());
/// request.extensions_mut().insert(mark.clone());
/// // The body was polled and had no frame:
/// mark.waits_for_frame();
/// // The transport took a frame, then the last one:
/// mark.frame_taken();
/// mark.sent();
/// assert!(mark.is_sent());
/// ```
#[derive(Clone)]
pub struct SentMark(Arc<Mutex<Progress>>);

#[derive(Clone, Copy, Debug)]
struct Progress {
    /// A layer measures this call. Until then no clock is read.
    measured: bool,
    sent: bool,
    /// When the transport took the last frame, or the body ended. `None` while the body has no frame for it.
    upstream_since: Option<Instant>,
}

impl SentMark {
    /// Returns the mark of a request whose body has not been polled yet.
    #[must_use]
    pub fn new() -> Self {
        let progress = Progress { measured: false, sent: false, upstream_since: None };
        Self(Arc::new(Mutex::new(progress)))
    }

    /// Reports that the transport asked for a frame and the body had none: time passes for the caller.
    pub fn waits_for_frame(&self) {
        self.update(|progress| progress.upstream_since = None);
    }

    /// Reports that the transport took a frame: until it asks for the next one, time passes for the upstream.
    pub fn frame_taken(&self) {
        self.update(|progress| progress.upstream_since = progress.measured.then(Instant::now));
    }

    /// Reports that the body has ended: the request has been sent.
    pub fn sent(&self) {
        self.update(|progress| {
            progress.sent = true;
            progress.upstream_since = progress.measured.then(Instant::now);
        });
    }

    /// Reports that the transport dropped the body: no more of the request will be sent. Where time passed for the
    /// upstream already, it goes on doing so.
    pub fn dropped(&self) {
        self.update(|progress| {
            progress.sent = true;
            if progress.measured {
                progress.upstream_since.get_or_insert_with(Instant::now);
            }
        });
    }

    /// Returns whether the request has been sent, as far as it will be.
    #[must_use]
    pub fn is_sent(&self) -> bool {
        self.progress().sent
    }

    /// Reads the clock from now on.
    pub(crate) fn measure(&self) {
        let mut progress = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !progress.measured {
            progress.measured = true;
            progress.upstream_since = progress.sent.then(Instant::now);
        }
    }

    /// Returns since when time passes for the upstream, if it does.
    pub(crate) fn upstream_since(&self) -> Option<Instant> {
        self.progress().upstream_since
    }

    /// Returns the clock as the progress of the body sets it.
    pub(crate) fn clock(&self) -> UpstreamClock {
        self.progress().upstream_since.map_or(UpstreamClock::OFF, UpstreamClock::running_since)
    }

    fn progress(&self) -> Progress {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn update(&self, update: impl FnOnce(&mut Progress)) {
        let mut progress = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !progress.sent {
            update(&mut progress);
        }
    }
}

thread_local! {
    static IS_MARK_WANTED: Cell<bool> = const { Cell::new(false) };
}

/// Tells an outer layer, while it polls its inner service for readiness, that a mark would be read: a request body that
/// no layer measures is not reported on.
#[inline]
pub(crate) fn want_mark() {
    IS_MARK_WANTED.set(true);
}

/// Runs `poll_ready` of an inner service, and returns whether an inner layer wants a mark.
#[inline]
#[cfg(feature = "retry")]
pub(crate) fn is_mark_wanted<T>(poll_ready: impl FnOnce() -> T) -> (T, bool) {
    IS_MARK_WANTED.set(false);
    let polled = poll_ready();
    (polled, IS_MARK_WANTED.get())
}

impl Default for SentMark {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for SentMark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SentMark").field("sent", &self.is_sent()).finish()
    }
}

// ===== What a pending call waits for =====

/// What a call waits for that has just returned `Pending`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WaitsFor {
    /// The upstream, as far as is known.
    #[default]
    Upstream,
    /// The caller: its request body has no frame.
    Caller,
    /// The client itself: a permit, a connection, the delay before the next attempt.
    Client,
}

thread_local! {
    static WAITS_FOR: Cell<WaitsFor> = const { Cell::new(WaitsFor::Upstream) };
}

impl WaitsFor {
    /// Forgets the last report. An outer layer does so before it polls an inner future.
    #[inline]
    pub(crate) fn reset() {
        WAITS_FOR.set(Self::Upstream);
    }

    /// Reports to the outer layers of the same poll. To be called just before returning `Pending`.
    #[inline]
    pub(crate) fn report(self) {
        WAITS_FOR.set(self);
    }

    /// Returns what the inner future reported, once it has returned `Pending`.
    #[inline]
    pub(crate) fn reported() -> Self {
        WAITS_FOR.get()
    }
}

// ===== Why a call is dropped =====

/// Why a layer drops an inner call. Without one the caller hung up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DropCause {
    /// A timeout or a deadline of the operator's has expired.
    #[cfg(any(feature = "retry", feature = "timeout"))]
    TimedOut,
    /// Another attempt of the same call has won.
    #[cfg(feature = "retry")]
    Superseded,
}

thread_local! {
    static DROP_CAUSE: Cell<Option<DropCause>> = const { Cell::new(None) };
}

#[cfg(any(feature = "retry", feature = "timeout"))]
impl DropCause {
    /// Runs `drop`, which drops inner calls for this cause.
    pub(crate) fn during<T>(self, drop: impl FnOnce() -> T) -> T {
        struct Restore(Option<DropCause>);

        impl Drop for Restore {
            fn drop(&mut self) {
                DROP_CAUSE.set(self.0);
            }
        }

        let _restore = Restore(DROP_CAUSE.replace(Some(self)));
        drop()
    }

    /// The cause of an expired deadline: none if the caller set it.
    pub(crate) fn of_deadline(source: super::DeadlineSource) -> Option<Self> {
        (source != super::DeadlineSource::Caller).then_some(Self::TimedOut)
    }
}

/// Returns the outcome of a call that is dropped now.
pub(super) fn dropped() -> Outcome {
    match DROP_CAUSE.get() {
        None => Outcome::cancelled(),
        #[cfg(any(feature = "retry", feature = "timeout"))]
        Some(DropCause::TimedOut) => Outcome::failure().because(Reason::Timeout),
        #[cfg(feature = "retry")]
        Some(DropCause::Superseded) => Outcome::cancelled().because(Reason::Superseded),
    }
}

// ===== Which side ended the call =====

/// How much of a caller's deadline may be left when the upstream reports that it has passed: the next hop may reserve
/// time for its response, and its clock may be ahead.
const DEADLINE_MARGIN: Duration = Duration::from_millis(100);

const GATEWAY_TIMEOUT: u16 = 504;

/// The default of `count_cancelled_after`: longer than callers wait by mistake, shorter than a hung upstream should go
/// unnoticed.
pub(crate) const COUNT_CANCELLED_AFTER: Duration = Duration::from_secs(1);

/// What is known of a call when it ends.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ending {
    pub(crate) clock: UpstreamClock,
    /// The response head is here: from then on the upstream does not owe an answer.
    pub(crate) answered: bool,
    /// The deadline that the caller set.
    pub(crate) caller_deadline: Option<CallerDeadline>,
    /// From when on a call that its caller ended counts as a failure. `None`: never.
    pub(crate) count_cancelled_after: Option<Duration>,
}

/// Decides whether a call that its caller ended, by hanging up or by a deadline, counts: only if the upstream had the
/// complete request for `count_cancelled_after` and gave no response head. Other outcomes stay as they are.
pub(crate) fn attribute(outcome: Outcome, ending: Ending) -> Outcome {
    let reason = match (outcome.kind(), outcome.reason()) {
        (OutcomeKind::Cancelled, reason @ (Reason::Dropped | Reason::CallerDeadline)) => reason,
        (OutcomeKind::Failure, _) if reports_deadline(outcome, ending) => Reason::CallerDeadline,
        _ => return outcome,
    };
    let waited = || ending.clock.elapsed(Instant::now());
    match ending.count_cancelled_after {
        Some(after) if !ending.answered && waited().is_some_and(|waited| waited >= after) => {
            Outcome::failure().because(Reason::NoResponse)
        }
        _ => Outcome::cancelled().because(reason),
    }
}

/// Whether the failure only says that the caller's deadline has passed.
fn reports_deadline(outcome: Outcome, ending: Ending) -> bool {
    let Some(left) = ending.caller_deadline.map(CallerDeadline::left) else { return false };
    match (outcome.reason(), outcome.code()) {
        (Reason::GrpcStatus, Some(grpc::DEADLINE_EXCEEDED))
        | (Reason::Status, Some(GATEWAY_TIMEOUT)) => left <= DEADLINE_MARGIN,
        // The body was cut off at the deadline, by a layer or by the next hop.
        (Reason::Body | Reason::MissingStatus, _) => left.is_zero(),
        _ => false,
    }
}
