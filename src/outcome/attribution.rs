//! Attribution: which side a call waits for, and which side ended it.
//!
//! A failure counts against the upstream only if the upstream caused it. Four questions decide that. One mechanism of
//! this file belongs to each:
//!
//! | question | mechanism |
//! |---|---|
//! | how long has the upstream had the request? | [`UpstreamClock`], kept in the permit |
//! | has the request been sent completely? | [`SentMark`], published by an outer layer that wraps the request body |
//! | what does a pending call wait for? | [`WaitsFor`], reported by an inner layer while it is polled |
//! | why is a call dropped? | [`DropCause`], set by an outer layer around the drop |
//!
//! [`attribute`] computes the outcome from them. No mechanism reads a clock before a call has to wait.

use std::{
    cell::Cell,
    fmt,
    num::NonZeroI64,
    sync::{Arc, OnceLock},
    time::Duration,
};

use tokio::time::Instant;

use super::{
    grpc,
    outcome::{Outcome, OutcomeKind, Reason},
};
use crate::sync::Mutex;
use crate::time::{Deadline, TIMER_MARGIN};

// ===== How long the upstream has had the request =====

/// Measures how long the upstream has had the request: the time since the request was sent, without the time for which
/// the response waits for its reader.
///
/// The clock is one word, because every permit contains one. 0 is off. Otherwise the highest bit is set, the second bit
/// is set while the clock is stopped, and the other bits are nanoseconds: the measured time of a stopped clock, or the
/// [moment](nanos_of) at which a running clock started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct UpstreamClock(u64);

const ON: u64 = 1 << 63;
const STOPPED: u64 = 1 << 62;
const TIME: u64 = STOPPED - 1;

impl UpstreamClock {
    /// The upstream does not have the request yet, or no layer measures the call.
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

    /// Returns the time measured until `now`. `None` if the clock is off.
    pub(crate) fn elapsed(self, now: Instant) -> Option<Duration> {
        let nanos = match self.0 & TIME {
            _ if self.is_off() => return None,
            time if self.is_stopped() => time,
            since => since_then(nanos_of(now), since),
        };
        Some(Duration::from_nanos(nanos))
    }

    /// Stops the clock. A clock that was off then stands at zero.
    pub(crate) fn stop(&mut self, now: Instant) {
        *self = Self::stopped_at(crate::time::nanos(self.elapsed(now).unwrap_or_default()));
    }

    /// Starts the clock, or resumes it.
    pub(crate) fn resume(&mut self) {
        if self.is_off() {
            *self = Self::start();
        } else if self.is_stopped() {
            let since = nanos_of(Instant::now()).wrapping_sub(self.0 & TIME) & TIME;
            *self = Self(ON | since);
        }
    }

    /// Stops the clock if it runs.
    pub(crate) fn pause(&mut self) {
        if !self.is_off() && !self.is_stopped() {
            self.stop(Instant::now());
        }
    }

    /// Resumes a stopped clock while the response has no frame for its reader, and stops it otherwise.
    pub(crate) fn body_polled(&mut self, is_pending: bool) {
        match is_pending {
            true if !self.is_off() => self.resume(),
            true => {}
            false => self.pause(),
        }
    }
}

/// Returns the nanoseconds from a fixed moment of this process to an instant, modulo 2⁶². Only differences have a
/// meaning.
fn nanos_of(instant: Instant) -> u64 {
    signed_nanos_of(instant) as u64 & TIME
}

/// Returns the nanoseconds from a fixed moment of this process to an instant, within 292 years. The moment may be later
/// than the instant, because paused clocks of several runtimes begin at different times.
fn signed_nanos_of(instant: Instant) -> i64 {
    static EPOCH: OnceLock<Instant> = OnceLock::new();
    let epoch = *EPOCH.get_or_init(Instant::now);
    let signed = |time| i64::try_from(crate::time::nanos(time)).unwrap_or(i64::MAX);
    match instant.checked_duration_since(epoch) {
        Some(after) => signed(after),
        None => -signed(epoch.saturating_duration_since(instant)),
    }
}

/// Returns the nanoseconds from `then` to `now`, or zero if `now` is earlier.
fn since_then(now: u64, then: u64) -> u64 {
    let nanos = now.wrapping_sub(then) & TIME;
    if nanos > TIME / 2 { 0 } else { nanos }
}

/// The instant of a caller deadline in nanoseconds. A deadline beyond the range of [`signed_nanos_of`] is clamped
/// to the end of the range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CallerDeadline(NonZeroI64);

impl CallerDeadline {
    #[inline]
    pub(crate) fn of(deadline: Option<Deadline>) -> Option<Self> {
        deadline.and_then(Deadline::of_caller).map(Self::new)
    }

    fn new(at: Instant) -> Self {
        const BEFORE_ZERO: NonZeroI64 = NonZeroI64::new(-1).unwrap();
        Self(NonZeroI64::new(signed_nanos_of(at)).unwrap_or(BEFORE_ZERO))
    }

    /// Returns the time until the deadline, or zero after it.
    fn left(self) -> Duration {
        let left = self.0.get().saturating_sub(signed_nanos_of(Instant::now()));
        Duration::from_nanos(u64::try_from(left).unwrap_or(0))
    }
}

// ===== Whether the request has been sent =====

/// The progress of a request body, published in the request's extensions by the layer that wraps the body: a
/// [`RetryLayer`](crate::retry::RetryLayer) or a [`HedgeLayer`](crate::hedge::HedgeLayer).
///
/// Layers that measure calls start their clocks by the mark, so that they do not attribute the time of a slow upload to
/// the upstream. A client of your own that wraps request bodies can publish a mark, too: insert a clone into the
/// extensions and report each frame. Without a mark the clocks start at the call.
///
/// Measuring layers request the mark in `poll_ready`. Each service between them and the retry or hedge must poll its
/// inner service within its own `poll_ready`. `tower::buffer` polls it in another task, and a full concurrency limit
/// polls it after the call. Then no mark is published, and the clocks start at the call.
///
/// ```
/// use buttress::outcome::SentMark;
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
pub(crate) struct Progress {
    /// A layer measures this call. Until then no clock is read.
    measured: bool,
    pub(crate) is_sent: bool,
    pub(crate) waits_for: WaitsFor,
    /// The start of this wait. `None` if no layer measures the call.
    pub(crate) since: Option<Instant>,
}

impl Progress {
    /// Records the start of a wait. A repeated report of a wait for the caller keeps the earlier start.
    fn begin_wait_for(&mut self, what: WaitsFor) {
        if what != WaitsFor::Caller || self.waits_for != what {
            self.waits_for = what;
            self.since = self.measured.then(Instant::now);
        }
    }

    /// Returns a clock that runs while the request waits for the upstream, and is off otherwise.
    pub(crate) fn clock(&self) -> UpstreamClock {
        match (self.waits_for, self.since) {
            (WaitsFor::Upstream, Some(since)) => UpstreamClock::running_since(since),
            _ => UpstreamClock::OFF,
        }
    }
}

impl SentMark {
    /// Returns the mark of a request whose body has not been polled yet.
    #[must_use]
    pub fn new() -> Self {
        Self(Arc::new(Mutex::new(Progress {
            measured: false,
            is_sent: false,
            waits_for: WaitsFor::Transport,
            since: None,
        })))
    }

    /// Reports that the transport polled the body and the body had no frame. The time from now on is attributed to the
    /// caller.
    pub fn waits_for_frame(&self) {
        self.update(|progress| progress.begin_wait_for(WaitsFor::Caller));
    }

    /// Reports that the transport took a frame. Until it polls for the next one, the time is attributed to the
    /// upstream.
    pub fn frame_taken(&self) {
        self.update(|progress| progress.begin_wait_for(WaitsFor::Upstream));
    }

    /// Reports that the body has ended: the request has been sent.
    pub fn sent(&self) {
        self.update(|progress| {
            progress.is_sent = true;
            progress.begin_wait_for(WaitsFor::Upstream);
        });
    }

    /// Reports that the transport dropped the body, so that no more of the request will be sent. A wait that is in
    /// progress continues, so that an incomplete request is never attributed to the upstream.
    pub fn dropped(&self) {
        self.update(|progress| {
            progress.is_sent = true;
            if progress.waits_for == WaitsFor::Transport {
                progress.begin_wait_for(WaitsFor::Upstream);
            }
        });
    }

    /// Ignores later reports. A layer calls this before it drops an inner call, because the drop of the body is a
    /// report.
    pub(crate) fn freeze(&self) {
        self.update(|progress| progress.is_sent = true);
    }

    /// Returns whether the request has been sent, or its body dropped.
    #[must_use]
    pub fn is_sent(&self) -> bool {
        self.progress().is_sent
    }

    /// Starts to read the clock at each report.
    pub(crate) fn measure(&self) {
        let mut progress = self.0.lock();
        if !progress.measured {
            progress.measured = true;
            if progress.waits_for != WaitsFor::Transport {
                progress.since = Some(Instant::now());
            }
        }
    }

    /// Returns a copy of the progress.
    pub(crate) fn progress(&self) -> Progress {
        *self.0.lock()
    }

    fn update(&self, update: impl FnOnce(&mut Progress)) {
        let mut progress = self.0.lock();
        if !progress.is_sent {
            update(&mut progress);
        }
    }
}

thread_local! {
    static IS_MARK_REQUESTED: Cell<bool> = const { Cell::new(false) };
}

/// Requests a mark from the outer layer that polls this service for readiness. Without a request the outer layer
/// publishes no mark, so that a body costs nothing if no layer measures it.
#[inline]
pub(crate) fn request_mark() {
    IS_MARK_REQUESTED.set(true);
}

/// Runs `poll_ready` of an inner service, and returns whether an inner layer has requested a mark. The flag
/// stays set for the next outer layer, also if it was set before.
#[inline]
pub(crate) fn is_mark_requested<T>(poll_ready: impl FnOnce() -> T) -> (T, bool) {
    struct Restore(bool);

    impl Drop for Restore {
        fn drop(&mut self) {
            IS_MARK_REQUESTED.set(self.0 || IS_MARK_REQUESTED.get());
        }
    }

    let _restore = Restore(IS_MARK_REQUESTED.replace(false));
    let polled = poll_ready();
    (polled, IS_MARK_REQUESTED.get())
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

/// The wait of a call that has just returned `Pending`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WaitsFor {
    /// The upstream. This is the default, used unless an inner layer reports another cause.
    #[default]
    Upstream,
    /// The caller: its request body has no frame.
    Caller,
    /// The client itself: a permit, a connection, the delay before the next attempt.
    Client,
    /// The transport, which has not polled the request body yet. It may be connecting.
    Transport,
}

thread_local! {
    static WAITS_FOR: Cell<WaitsFor> = const { Cell::new(WaitsFor::Upstream) };
}

impl WaitsFor {
    /// Resets the report to `Upstream`. An outer layer calls this before it polls an inner future.
    #[inline]
    pub(crate) fn reset() {
        WAITS_FOR.set(Self::Upstream);
    }

    /// Reports to the outer layers of the same poll. An inner layer calls this just before it returns `Pending`.
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

/// Why a layer drops an inner call. Without a cause the drop is a hang-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DropCause {
    /// A timeout of this duration has expired, or an operator deadline (`None`).
    TimedOut(Option<Duration>),
    /// Another attempt of the same call has won.
    Superseded,
}

thread_local! {
    static DROP_CAUSE: Cell<Option<DropCause>> = const { Cell::new(None) };
}

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

    /// Returns the cause of an expired deadline. `None` if the caller set it.
    pub(crate) fn of_deadline(source: crate::time::DeadlineSource) -> Option<Self> {
        (source != crate::time::DeadlineSource::Caller).then_some(Self::TimedOut(None))
    }
}

/// Returns the outcome of a call that is dropped now, by the time for which the upstream had the request.
///
/// A timeout counts only if the upstream had the request for at least half of its duration. Otherwise the drop is
/// a hang-up, because another part of the program used the time. For example, the handler of a server read a slow
/// upload before it called the upstream. If the clock is off, [`attribute`] decides by what the call waited for.
#[cfg_attr(not(any(feature = "retry", feature = "timeout")), allow(unused_variables))]
pub(crate) fn dropped(clock: UpstreamClock) -> Outcome {
    match DROP_CAUSE.get() {
        None => Outcome::cancelled(),
        Some(DropCause::TimedOut(limit)) => {
            let had_half_of = |limit: Duration| {
                clock.elapsed(Instant::now()).is_none_or(|elapsed| elapsed >= limit / 2)
            };
            match limit {
                Some(limit) if !had_half_of(limit) => Outcome::cancelled(),
                _ => Outcome::failure().because(Reason::Timeout),
            }
        }
        Some(DropCause::Superseded) => Outcome::cancelled().because(Reason::Superseded),
    }
}

// ===== Which side ended the call =====

/// The maximum time until a caller deadline at which a report of the upstream that it has passed is accepted. The next
/// hop may reserve time for its response, and its clock may be ahead.
const DEADLINE_MARGIN: Duration = Duration::from_millis(100);

const GATEWAY_TIMEOUT: u16 = 504;

/// The default of `count_cancelled_after`. Deadlines that callers set too short are usually shorter than this time, and
/// a hung upstream still opens a circuit within a few calls.
pub(crate) const COUNT_CANCELLED_AFTER: Duration = Duration::from_secs(1);

/// The state of a call at its end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ending {
    pub(crate) clock: UpstreamClock,
    /// The response head has arrived. A call that its caller ends after that is never a failure.
    pub(crate) has_head: bool,
    /// The deadline that the caller set.
    pub(crate) caller_deadline: Option<CallerDeadline>,
    /// The time after which a call that its caller ended counts as a failure. `None`: never.
    pub(crate) count_cancelled_after: Option<Duration>,
    /// What the call waited for at its end.
    pub(crate) waits_for: WaitsFor,
}

/// Attributes the outcome of a call that its caller ended, by a hang-up or by a deadline. The call is a failure if the
/// upstream had the complete request for `count_cancelled_after` and sent no response head, and is cancelled otherwise.
/// A timeout before the response head is cancelled if the call waited for its caller or inside the client at that time.
/// Other outcomes are returned unchanged.
pub(crate) fn attribute(outcome: Outcome, ending: Ending) -> Outcome {
    let reason = match (outcome.kind(), outcome.reason()) {
        // The timeout expired during the upload, or in the queue of an inner layer.
        (OutcomeKind::Failure, Reason::Timeout)
            if !ending.has_head && ending.waits_for == WaitsFor::Caller =>
        {
            return Outcome::cancelled().because(Reason::Caller);
        }
        (OutcomeKind::Failure, Reason::Timeout)
            if !ending.has_head && ending.waits_for == WaitsFor::Client =>
        {
            return Outcome::cancelled().because(Reason::Timeout);
        }
        (OutcomeKind::Cancelled, reason @ (Reason::Dropped | Reason::CallerDeadline)) => reason,
        (OutcomeKind::Failure, _) if reports_deadline(outcome, ending) => Reason::CallerDeadline,
        _ => return outcome,
    };
    let waited = || ending.clock.elapsed(Instant::now());
    match ending.count_cancelled_after {
        Some(after) if !ending.has_head && waited().is_some_and(|waited| waited >= after) => {
            Outcome::failure().because(Reason::NoResponse)
        }
        _ => Outcome::cancelled().because(reason),
    }
}

/// Returns whether the failure only reports that the caller's deadline has passed.
fn reports_deadline(outcome: Outcome, ending: Ending) -> bool {
    let Some(left) = ending.caller_deadline.map(CallerDeadline::left) else { return false };
    match (outcome.reason(), outcome.code()) {
        (Reason::GrpcStatus, Some(grpc::DEADLINE_EXCEEDED))
        | (Reason::Status, Some(GATEWAY_TIMEOUT)) => left <= DEADLINE_MARGIN,
        // A timer of the client expired at the deadline, such as that of a tonic channel on `grpc-timeout`.
        (Reason::Timeout, _) => left <= TIMER_MARGIN,
        // The body was cut off at the deadline, by a layer or by the next hop.
        (Reason::Body | Reason::MissingStatus, _) => left <= TIMER_MARGIN,
        _ => false,
    }
}
